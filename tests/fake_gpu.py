"""A pretended GPU: tensors on "cuda:0" that have a shape, a dtype and a device, and no numbers.

    with FakeGPU() as gpu:
        ...  # whatever runs on the device GPU
    gpu.reads, gpu.copies, gpu.waits    # where the CPU asked the GPU for a value, or gave it one

Tensors on the CPU are real, so what the host works out (packs, layouts, files) is what it would be.
Tensors on the GPU are PyTorch's FakeTensors: each operation works out shape, dtype and device of
its result, and refuses arguments on two devices. A value that is read from there is always 1.
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from helpers import ROOT
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import varlen  # noqa: F401  makes torch.ops.torch_attn
from torch.utils._pytree import tree_map

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# What CUDA's kernels refuse and a FakeTensor lets pass: numbers of two floating-point dtypes.
ONE_DTYPE = {
    aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.index_put, aten.index_put_,
    aten.index_add, aten.index_add_, aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_flash_attention, torch.ops.torch_attn._varlen_attn}


class Refused(Exception):
    """What a GPU cannot do, or only after the CPU has waited for it."""


class FakeGPU(FakeTensorMode):
    """See above. The lists hold "file.py:function", the innermost place in this project's code."""

    avoid_device_init = True  # a GPU that is really there is not used

    def __init__(self):
        super().__init__()
        self.reads = []  # a value, or a tensor, came to the CPU, which waited for the GPU
        self.copies = []  # a tensor went to the GPU
        self.waits = []  # those of them for which the CPU waited as well
        self.pinned = []  # tensors in page-locked memory, whose copies need no waiting
        self.managers = []

    def __enter__(self):
        stack = ExitStack()
        self.managers.append(stack)
        # In one thread an operation of backward is found in the frames of its update.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        # PyTorch's C++ code must not meet a device that this machine lacks, and is told "meta".
        device_of = {torch.ops.prim.device.default: lambda args: torch.device("meta")}
        stack.enter_context(mock.patch.dict(fake_tensor._DISPATCH_META_HANDLERS, device_of))
        # varlen_attn of PyTorch 2.15 chooses its kernel by the GPU: an A100, which has just one.
        stack.enter_context(mock.patch("torch.cuda.get_device_capability", lambda *_: (8, 0)))
        for name, value in {"is_cuda": property(is_cuda), "tolist": self.tolist_of()}.items():
            stack.enter_context(mock.patch.object(FakeTensor, name, value, create=True))
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.managers.pop().__exit__(*exception)

    def tolist_of(self):
        """FakeTensor.tolist as one reading; PyTorch's own would read each number apart."""
        def tolist(tensor):
            self.reads.append(place())
            with unset_fake_temporarily():
                return torch.ones(tensor.shape, dtype=tensor.dtype).tolist()
        return tolist

    def dispatch(self, func, types, args=(), kwargs=None):
        """Every operation comes here: those on CPU tensors are done, the others are pretended."""
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and device.type == "meta":  # what C++ code was told, see above
            kwargs["device"] = GPU
        tensors = tensors_in(args) + tensors_in(kwargs.values())
        on_gpu = [x for x in tensors if isinstance(x, FakeTensor)]
        if func is aten._local_scalar_dense.default and on_gpu:
            self.reads.append(place())
            return number_1(args[0].dtype)
        if func is aten._to_copy.default:
            return self.to_copy(func, types, args, kwargs)
        if func is aten.copy_.default and on_gpu and len(on_gpu) < len(tensors):
            return self.copy_between(func, types, *args)
        if func is aten.is_pinned.default:
            return self.is_pinned(args[0])
        if func is aten._pin_memory.default:
            return self.pin(args[0])
        if on_gpu or (kwargs.get("device") == GPU and not tensors):
            if len(on_gpu) < len(tensors):
                args, kwargs = tree_map(self.beside_gpu, (args, kwargs))
            dtypes = {x.dtype for x in tensors if x.is_floating_point()}
            if func.overloadpacket in ONE_DTYPE and len(dtypes) > 1:
                raise Refused(f"{func} was given more than one dtype: {dtypes}")
            return super().dispatch(func, types, args, kwargs)
        is_pinned = kwargs.pop("pin_memory", False)
        with unset_fake_temporarily():
            made = func(*args, **kwargs)
        if is_pinned:
            self.pinned.append(made)
        return made

    def to_copy(self, func, types, args, kwargs):
        """x.to(...) where something changes."""
        x = args[0]
        device = kwargs.get("device") or x.device
        if not isinstance(x, FakeTensor) and device.type == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if not isinstance(x, FakeTensor):
            self.note_copy(x, kwargs.get("non_blocking", False))
            return self.on_gpu(x.shape, kwargs.get("dtype") or x.dtype)
        if device.type == "cpu":
            self.reads.append(place())
            with unset_fake_temporarily():
                return torch.ones(x.shape, dtype=kwargs.get("dtype") or x.dtype)
        return super().dispatch(func, types, args, kwargs)

    def copy_between(self, func, types, target, source, non_blocking=False):
        """target.copy_(source) between CPU and GPU."""
        if isinstance(target, FakeTensor):
            self.note_copy(source, non_blocking)
            on_gpu = self.on_gpu(source.shape, source.dtype)
            return super().dispatch(func, types, (target, on_gpu), {})
        self.reads.append(place())
        with unset_fake_temporarily():
            return target.fill_(1)

    def on_gpu(self, shape, dtype):
        like = {"dtype": dtype, "device": GPU}
        return super().dispatch(aten.empty.memory_format, (), (list(shape),), like)

    def note_copy(self, x, non_blocking: bool) -> None:
        self.copies.append(place())
        if not (non_blocking and self.is_pinned(x)):
            self.waits.append(place())

    def is_pinned(self, x) -> bool:
        return any(x is pinned for pinned in self.pinned)

    def pin(self, x):
        with unset_fake_temporarily():
            self.pinned.append(x.clone())
        return self.pinned[-1]

    def beside_gpu(self, x):
        """An argument of an operation on the GPU: a number may be on the CPU, a tensor may not."""
        if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor):
            return x
        if x.dim() > 0:
            raise Refused(f"a tensor {tuple(x.shape)} on the CPU meets one on the GPU")
        return self.from_tensor(x)


def tensors_in(values) -> list[torch.Tensor]:
    """The tensors among an operation's arguments, which may be in lists."""
    found = []
    for x in values:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += tensors_in(x)
    return found


def is_cuda(x: FakeTensor) -> bool:
    return x.fake_device.type == "cuda"


def number_1(dtype):
    with unset_fake_temporarily():
        return torch.ones((), dtype=dtype).item()


def place() -> str:
    """ "file.py:function" of the innermost frame in this project's code, this file apart."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        name = frame.f_code.co_name
        if file.startswith(str(ROOT)) and file != __file__ and not name.startswith("<"):
            return f"{Path(file).name}:{name}"  # of a comprehension, the function it stands in
        frame = frame.f_back
    return "none"
