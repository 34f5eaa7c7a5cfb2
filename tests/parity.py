"""Our decoder against transformers' on your own checkpoint: hidden states, logits, prompt ids.

    pip install -r requirements-dev.txt
    python -m tests.parity --model DIR [--adapter DIR] [--dtype bfloat16] [--device cpu]

Runs the README's first tokens and a chat prompt, packed here, one by one there, and prints for
every layer how far the two are apart, in units of the standard deviation of transformers' states.
In float32 what is left is rounding: 1e-6, more in deep models with outliers. In bfloat16 both sides
round at each operation, and a per cent or two is what two correct programs differ by. The exit code
is 3 beyond the bound that is printed. --break shows what a wrong decoder looks like.
"""

import sys
from pathlib import Path

import torch

from cli import TINY, Parser, RunFailed, at_least, exit_code
from device import add_device_flags, device_and_dtype
from lora import load_adapter
from model import load_model
from tests.helpers import hf_states, states
from tokenizer import DATE, Tokenizer

# Root mean square of the difference over the std. float32: spec of this project, 1e-5. bfloat16
# has 8 bits: relative errors of 0.013 to 0.028 were seen between correct programs.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 0.05}
QUESTION = [{"role": "user", "content": "Is this the same model?\n\n  Täglich 3.14 grüße, 日本 🙂"}]


def parse(argv):
    p = Parser("parity", "Compare a checkpoint's hidden states here and in transformers.")
    p.add_argument("--model", default=TINY, help="Hugging Face folder")
    p.add_argument("--adapter", help="folder with an adapter in PEFT's format")
    p.add_argument("--tokens", type=at_least(int, 1), default=512, help="of the longest sequence")
    p.add_argument("--break", dest="damage", choices=("rope", "norm"),
                   help="a negative control: damage our side first")
    add_device_flags(p)
    return p.parse_args(argv)


def sequences(tokenizer, n: int) -> list[torch.Tensor]:
    """The README in a long and a short piece, and a chat prompt."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    ids = tokenizer.encode(text)
    return [torch.tensor(s) for s in (ids[:n], ids[-37:], tokenizer.encode_prompt(QUESTION))]


def ours(args, tokens):
    """Every state of our model, on the CPU in fp32."""
    device, dtype = device_and_dtype(args.device, args.dtype, args.cuda_graph)
    model = load_model(args.model, device, dtype)
    if args.adapter:
        load_adapter(model, args.adapter)
    if args.damage == "rope":
        model.config.rope_theta *= 2
    if args.damage == "norm":
        model.model.norm.weight.data *= 1.001
    found = states(model, torch.cat(tokens).to(device), [len(t) for t in tokens])
    return [t.float().cpu() for t in found]


def theirs(args, tokens):
    """The same from transformers, with PEFT's adapter on it."""
    import transformers

    device, dtype = device_and_dtype(args.device, args.dtype, args.cuda_graph)
    hf = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
    if args.adapter:
        import peft

        hf = peft.PeftModel.from_pretrained(hf, args.adapter).base_model.model
    return [t.float().cpu() for t in hf_states(hf.eval(), [t.to(device) for t in tokens])]


def same_prompt(args, tokenizer) -> bool:
    """Whether transformers' chat template makes the same ids of the question."""
    import transformers

    there = transformers.AutoTokenizer.from_pretrained(args.model).apply_chat_template(
        QUESTION, add_generation_prompt=True, tokenize=True, return_dict=False, date_string=DATE)
    return there == tokenizer.encode_prompt(QUESTION)


def compare(args) -> None:
    """Prints the table; RunFailed where the two are further apart than rounding explains."""
    tokenizer = Tokenizer(args.model)
    tokens = sequences(tokenizer, args.tokens)
    mine = ours(args, tokens)
    reference = theirs(args, tokens)
    names = [f"layer {i}" for i in range(len(mine) - 2)] + ["final norm", "logits"]
    print(f"{args.model}{' + ' + args.adapter if args.adapter else ''}: "
          f"{', '.join(str(len(t)) for t in tokens)} tokens, in standard deviations\n"
          f"{'':12}{'rms':>10}{'largest':>10}")
    worst = 0.0
    for name, a, b in zip(names, mine, reference, strict=True):
        difference = (a.double() - b) / b.double().std()
        rms = difference.square().mean().sqrt().item()
        worst = max(worst, rms)
        print(f"{name:12}{rms:10.1e}{difference.abs().max().item():10.1e}")
    agree = (mine[-1].argmax(-1) == reference[-1].argmax(-1)).double().mean().item()
    same = same_prompt(args, tokenizer)
    _, dtype = device_and_dtype(args.device, args.dtype, args.cuda_graph)
    bound = BOUND[dtype]
    print(f"likeliest token the same at {100 * agree:.1f} % of the positions\n"
          f"chat prompt ids the same: {'yes' if same else 'no'}\n"
          f"worst rms {worst:.1e}, bound {bound:.0e}")
    if not (worst <= bound and same):
        raise RunFailed("the two differ by more than rounding; please report the checkpoint.")


def main(argv=None) -> int:
    """0 the same, 2 the user's mistake, 3 not the same."""
    return exit_code("parity", lambda: compare(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
