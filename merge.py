"""Writes a model and its adapter as one Hugging Face folder, for programs that know no adapters.

    python merge.py --model DIR --adapter DIR --out DIR

W + s B A is added in fp32 and rounded once, in the shards, names and dtypes of the model's own
files. The folder appears whole or not at all: it is made as DIR.part, which a killed merge leaves
and the next one replaces.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cli import Parser, exit_code
from files import locked, make_folder, names_in
from lora import load_adapter, merge, whole_modules
from model import INDEX, Llama, UserError, load_model, read_tensors, stale_index, weight_files

N_TOKENS = 256  # random tokens over which the logits before and after merging are compared
COPIED = (".json", ".model", ".txt", ".jinja")  # config, index, tokenizer and chat template
NOT_COPIED = ("adapter_config.json",)  # transformers would put that adapter on the merged model


def merge_folder(model_dir, adapter_dir, out) -> str:
    """Writes the folder -> a sentence on how far the one rounding of W + s B A moved the logits."""
    model_dir = Path(model_dir)
    out = Path(out)
    if names_in(out):
        raise UserError(f"{out} exists and is not an empty folder; pass another --out.")
    part = part_of(out)
    foreign = names_in(part) - written_names(model_dir)
    if foreign:
        raise UserError(f"{part}, where the folder is to be made, holds {min(foreign)}, which no "
                        "merge of this model writes; move it away, or pass another --out.")
    model = load_model(model_dir, dtype=None)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.ndim == 2}
    if len(dtypes) > 1:
        raise UserError(f"{model_dir} mixes {' and '.join(sorted(dtypes))}, expected one dtype.")
    load_adapter(model, adapter_dir)
    if whole_modules(model):
        raise UserError(f"{adapter_dir} holds whole modules, expected adapters alone to merge.")
    before = random_logits(model)
    merge(model)
    largest = (random_logits(model).float() - before.float()).abs().max()
    write_folder(model_dir, model.state_dict(), out)
    dtype = str(before.dtype).removeprefix("torch.")
    return (f"{out}: over {len(before)} random tokens in {dtype} merging moved a logit by "
            f"{largest:.2g} at the most; the logits' standard deviation is "
            f"{before.float().std():.2g}.")


@torch.no_grad()
def random_logits(model: Llama) -> Tensor:
    """The logits of the same random tokens each time, (N, V)."""
    n = min(N_TOKENS, model.config.max_positions)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (n,), generator=generator)
    return model(ids, [n])


def write_folder(model_dir: Path, merged: dict[str, Tensor], out: Path) -> None:
    """The model's folder with the merged tensors, made beside `out` and then renamed to it."""
    part = part_of(out)
    make_folder(part)
    with locked(part):
        for name in names_in(part):  # of a merge that was killed
            (part / name).unlink()
        write_part(model_dir, merged, part, out.resolve())


def part_of(out: Path) -> Path:
    """Where the folder is made, before it gets its name."""
    out = out.resolve()
    return out.with_name(out.name + ".part")


def written_names(model_dir: Path) -> set[str]:
    return {path.name for path in [*weight_files(model_dir), *small_files(model_dir)]}


def write_part(model_dir: Path, merged: dict[str, Tensor], part: Path, out: Path) -> None:
    """Writes the folder and renames it; on an error nothing is left."""
    try:
        for path in weight_files(model_dir):
            tensors = {name: merged.get(name, tensor) for name, tensor in read_tensors(path)}
            save_file(tensors, part / path.name, {"format": "pt"})
            (part / path.name).chmod(0o644)  # safetensors lets only their owner read them
        for path in small_files(model_dir):
            shutil.copyfile(path, part / path.name)
        os.replace(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def small_files(model_dir: Path) -> list[Path]:
    """What is copied as it is; an index that means other files than those written is not."""
    left_out = NOT_COPIED
    if stale_index(model_dir):
        left_out += (INDEX,)
    return [path for path in model_dir.iterdir()
            if path.is_file() and path.suffix in COPIED and path.name not in left_out]


def main(argv=None) -> int:
    """0 done, 2 the user's mistake, 3 failed, 130 interrupted."""
    p = Parser("merge.py", "Merge an adapter into its model, as a Hugging Face folder.")
    p.add_argument("--model", required=True, help="Hugging Face folder")
    p.add_argument("--adapter", required=True, help="folder with an adapter in PEFT's format")
    p.add_argument("--out", required=True, help="folder to write")
    args = p.parse_args(argv)
    return exit_code("merge.py", lambda: print(merge_folder(args.model, args.adapter, args.out)))


if __name__ == "__main__":
    sys.exit(main())
