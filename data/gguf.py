"""A GGUF file -> a Hugging Face folder that this project, transformers and PEFT load.

    python -m data.gguf FILE --out DIR [--dtype bfloat16|float32]

GGUF is llama.cpp's format: weights, tokenizer and chat template in one file, and most weights in
blocks of 32 or 256 small integers with a scale each. The `gguf` package reads it, and transformers
computes the weights and renames them; here stand the checks around the two. transformers leaves out
what it does not know without a word, so every setting and every tensor of the file must be
accounted for before any weight is computed.

Why bfloat16 is the default: a rounding to bfloat16 moves a weight by at most 1/256 of itself, far
less than a 4-bit quantisation has moved it before (in SmolLM2's Q4_1 file by 8 % of the weights'
root mean square, against 0.13 % by bfloat16). float32 would keep that error more exactly, at twice
the size. What the file has in F32, norms and biases, was mostly bfloat16 before it was made.

The folder appears whole or not at all: it is made as DIR.part, opened there as every program here
opens a model, and then renamed. A killed program leaves DIR.part, and the next one replaces it.
"""

import json
import os
import shutil
import struct
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from cli import Parser, exit_code
from files import locked, make_folder, names_in
from model import SINGLE, UserError, load_model, read_config, read_json
from tokenizer import Tokenizer

# What transformers and this project know. A Mistral is written as "llama", which it is but for its
# sliding window. Of the Gemmas, transformers reads no "gemma", and the later ones do not run here.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Settings of a file that only repeat the head's size.
HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
NEEDED = ("block_count", "context_length", "embedding_length", "feed_forward_length",
          "attention.head_count", "attention.layer_norm_rms_epsilon", "rope.freq_base")
# Lists with an item for each token, which take seconds to read.
LONG = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges"))
STOPS = ("eos", "eot", "eom")  # end of text, of turn, of message: any of them ends a reply
WRITTEN = (SINGLE, "config.json", "generation_config.json", "tokenizer.json",
           "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
# How gguf fails on bytes that are no GGUF, or not all of one.
BAD_BYTES = (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error)
# How transformers fails on a file whose content it does not know.
NOT_KNOWN = (ValueError, IndexError, KeyError, TypeError, AttributeError, ArithmeticError,
             NotImplementedError)


# the file


@dataclass
class File:
    """A GGUF file as far as it is read before its weights are."""

    path: Path
    architecture: str
    settings: dict  # every key but the long lists, such as "llama.block_count"
    tokens: list[str]  # by id
    types: dict[str, str]  # how each tensor is stored: {"blk.0.attn_q.weight": "Q4_1"}
    shapes: dict[str, tuple[int, ...]]  # by the same names, in torch's order

    def own_settings(self) -> dict:
        """The settings of the architecture, without its name in front."""
        prefix = self.architecture + "."
        return {key.removeprefix(prefix): value for key, value in self.settings.items()
                if key.startswith(prefix)}


def need_packages() -> None:
    """UserError where a package is missing that reads these files."""
    try:
        import accelerate  # noqa: F401, transformers asks for it once it is given a GGUF file
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as e:
        raise UserError(f"{e.name} is not installed, expected gguf, transformers and accelerate to "
                        "read a GGUF file; pip install -r requirements-dev.txt") from None


def read_file(path: Path) -> File:
    """Reads all but the weights; UserError where it is not one whole GGUF model of ours."""
    from gguf import GGUFReader

    if not path.is_file():
        raise UserError(f"{path} is not a file, expected a GGUF file.")
    try:
        reader = GGUFReader(path)
        settings = {}
        for key, field in reader.fields.items():
            if key not in LONG:
                settings[key] = field.contents()
        tokens = reader.fields.get("tokenizer.ggml.tokens")
        tokens = tokens.contents() if tokens else []
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}); fetch it again.") from None
    except BAD_BYTES as e:
        raise UserError(f"{path} is not a whole GGUF file ({e}); it is cut short or something "
                        "else, fetch it again.") from None
    types = {}
    shapes = {}
    for tensor in reader.tensors:
        types[tensor.name] = tensor.tensor_type.name
        shapes[tensor.name] = tuple(int(n) for n in reversed(tensor.shape))
    architecture = str(settings.get("general.architecture"))
    file = File(path, architecture, settings, tokens, types, shapes)
    check_file(file)
    return file


def check_file(file: File) -> None:
    """UserError where the file is a part or an addition, or of an architecture not run here."""
    kind = file.settings.get("general.type", "model")
    if kind != "model" or "adapter.type" in file.settings:
        raise UserError(f"{file.path} holds no model of its own (its general.type is {kind}), "
                        "expected one; convert the model that it belongs to.")
    n_parts = file.settings.get("split.count", 1)
    if n_parts > 1:
        raise UserError(f"{file.path} is one of {n_parts} parts of a split file, expected a whole "
                        "one; join them with llama.cpp's llama-gguf-split --merge.")
    if file.architecture not in ARCHITECTURES:
        raise UserError(f"{file.path} has the architecture {file.architecture}, expected one of "
                        f"{', '.join(ARCHITECTURES)}; choose another model, or its Hugging Face "
                        "folder.")
    if not file.settings.get("tokenizer.chat_template"):
        raise UserError(f"{file.path} has no chat template, expected a chat model's; choose an "
                        "instruct model.")
    for key in NEEDED:
        if key not in file.own_settings():
            raise UserError(f"{file.path} has no {file.architecture}.{key}, expected a number; "
                            "choose another file of this model.")
    for id in stop_ids(file):
        if id >= len(file.tokens):
            raise UserError(f"{file.path} names the stop id {id} and has {len(file.tokens)} "
                            "tokens, expected a token for it; fetch the file again.")


def stop_ids(file: File) -> list[int]:
    """The ids that end a reply, as the file names them, each once."""
    found = []
    for name in STOPS:
        id = file.settings.get(f"tokenizer.ggml.{name}_token_id")
        if id is not None and id not in found:
            found.append(id)
    if not found:
        raise UserError(f"{file.path} names no token that ends a reply, expected an "
                        "eos_token_id; choose another file of this model.")
    return found


# everything in the file is accounted for


def config_of(file: File):
    """transformers' config of the file, put right; UserError where a setting is left out."""
    from transformers import AutoConfig
    from transformers.integrations import GGUF_CONFIG_MAPPING

    try:
        config = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)
    except NOT_KNOWN as e:
        raise not_known(file, e) from None
    # Where the file names no such token, transformers takes its class's default, another token.
    config.bos_token_id = file.settings.get("tokenizer.ggml.bos_token_id")
    config.pad_token_id = file.settings.get("tokenizer.ggml.padding_token_id")
    config.eos_token_id = stop_ids(file)[0]
    own = file.own_settings()
    if "attention.key_length" in own:  # transformers reads it for some architectures only
        config.head_dim = own["attention.key_length"]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    known = GGUF_CONFIG_MAPPING[file.architecture]
    for key, value in own.items():
        if key in HEAD_SIZES:
            is_kept = value == head_dim
        else:
            is_kept = known.get(key) is not None and not isinstance(value, list)
        if not is_kept:
            raise UserError(f"{file.path} has {file.architecture}.{key} {str(value)[:40]}, which "
                            "the folder would not keep, so the model would be another one; take "
                            "its Hugging Face folder.")
    return config


def check_tensors(file: File, config) -> None:
    """UserError where file and model do not have the same tensors in the same shapes."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):  # names and shapes alone
            model = AutoModelForCausalLM.from_config(config)
    except NOT_KNOWN as e:
        raise not_known(file, e) from None
    by_name = {name: architecture for architecture, name in MODEL_ARCH_NAMES.items()}
    name_map = get_tensor_name_map(by_name[file.architecture], config.num_hidden_layers)
    expected = {}
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        expected[f"{name_map.get_name(module)}.{kind}"] = tuple(tensor.shape)
    if config.tie_word_embeddings:
        del expected["output.weight"]
    for name in sorted(expected.keys() | file.shapes.keys()):
        given = file.shapes.get(name)
        if given != expected.get(name):
            raise UserError(f"{file.path} holds {name} as {given}, expected {expected.get(name)} "
                            "by its settings (None: no such tensor); take the model's Hugging Face "
                            "folder.")


def not_known(file: File, error: Exception) -> UserError:
    return UserError(f"{file.path} is a GGUF file that transformers does not read ({error}); take "
                     "the model's Hugging Face folder.")


# the folder


def convert(path: Path, out: Path, dtype: torch.dtype) -> File:
    """Writes the folder -> what was found in the file."""
    if names_in(out):
        raise UserError(f"{out} exists and is not an empty folder; pass another --out.")
    part = out.resolve().with_name(out.resolve().name + ".part")
    foreign = names_in(part) - set(WRITTEN)
    if foreign:
        raise UserError(f"{part}, where the folder is to be made, holds {min(foreign)}, which this "
                        "program does not write; move it away, or pass another --out.")
    need_packages()
    file = read_file(path.resolve())
    config = config_of(file)
    check_tensors(file, config)
    make_folder(part)
    with locked(part):
        try:
            for name in names_in(part):  # of a program that was killed
                (part / name).unlink()
            write_part(file, config, part, dtype)
            check_part(file, part)
            os.replace(part, out.resolve())
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    return file


def write_part(file: File, config, part: Path, dtype: torch.dtype) -> None:
    """Weights, config.json, generation_config.json, tokenizer and template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    place = file.path.parent
    name = file.path.name
    try:
        model = AutoModelForCausalLM.from_pretrained(
            place, gguf_file=name, config=config, dtype=dtype,
            quantization_config=GgufConfig(dequantize=True))
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
    except NOT_KNOWN as e:
        raise not_known(file, e) from None
    tensors = model.state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # it is the embedding, which the folder holds once
    # Not by save_pretrained, which refuses a model that came from a GGUF file.
    save_file(tensors, part / SINGLE, {"format": "pt"})
    (part / SINGLE).chmod(0o644)  # safetensors lets only their owner read them
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(part)
    GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=stop_ids(file),
                     pad_token_id=config.pad_token_id, do_sample=False).save_pretrained(part)
    tokenizer.save_pretrained(part)
    drop_tokens_of_others(part / "tokenizer.json", len(file.tokens))


def drop_tokens_of_others(path: Path, n_tokens: int) -> None:
    """Takes out of tokenizer.json the added tokens whose ids the file does not have.

    transformers builds a byte-level tokenizer by its class for GPT-2, which adds GPT-2's own
    "<|endoftext|>" behind a vocabulary that has no such token (Llama 3's): the model has no row
    for it.
    """
    content = read_json(path)
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < n_tokens]
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def check_part(file: File, part: Path) -> None:
    """Opens the folder as every program here does; UserError where one could not."""
    try:
        read_config(part)
        load_model(part, dtype=None)
        Tokenizer(part)
    except UserError as e:
        raise UserError(f"{file.path} was converted and cannot be opened here: {e}") from None


# the program


def report(file: File, out: Path) -> str:
    """What was found in the file, and what to run next."""
    stored = ", ".join(f"{n} {kind}" for kind, n in Counter(file.types.values()).most_common())
    stops = ", ".join(f"{file.tokens[id]} ({id})" for id in stop_ids(file))
    lines = [
        f"{file.path.name}: {file.settings.get('general.name', 'no name')}",
        f"architecture   {file.architecture}",
        f"tensors        {len(file.types)}: {stored}",
        f"chat template  {len(file.settings['tokenizer.chat_template'])} characters",
        f"stop tokens    {stops}",
    ]
    if splits_as_gpt2(file):
        rule = file.settings["tokenizer.ggml.pre"]
        lines.append(f"splitting      {rule}, for which transformers has no rule: texts are split "
                     "as GPT-2's are")
    lines += [
        f"written        {out}",
        f'next           python generate.py --model {out} --prompt "How do I bake bread?"',
    ]
    return "\n".join(lines)


def splits_as_gpt2(file: File) -> bool:
    """Whether the file asks for a split of texts that transformers does not know.

    It then takes GPT-2's without a word. SmolLM2 is such a file: the two differ where two or more
    spaces stand before a digit.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    asked = file.settings.get("tokenizer.ggml.pre")
    is_byte_level = file.settings.get("tokenizer.ggml.model") == "gpt2"
    return is_byte_level and asked not in (None, "default", "gpt-2", *GGUF_PRE_TOKENIZER_SPLITS)


def execute(args) -> None:
    out = Path(args.out)
    file = convert(Path(args.file), out, getattr(torch, args.dtype))
    print(report(file, out))


def main(argv=None) -> int:
    """0 done, 2 the user's mistake, 3 failed, 130 interrupted."""
    p = Parser("data.gguf", "A GGUF file -> a Hugging Face folder (docs/real-weights.md).")
    p.add_argument("file", metavar="FILE", help="GGUF file of a chat model, in one part")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                   help="of the weights that are written")
    return exit_code("data.gguf", lambda: execute(p.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
