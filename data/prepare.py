"""Public downloads -> a data folder (data/README.md): one JSONL format, prompts kept apart.

    python -m data.prepare --out DATA --sst2 DIR --agnews DIR --gsm8k DIR --alpaca FILE \\
        --beavertails DIR --xstest FILE

Where each file comes from, its licence and its digest stand in data/README.md. Rows keep the order
of their file, as in the papers' repositories; --shuffle SEED draws another order of the training
rows. Prompts are compared by their letters and digits: what stands in the harmful rows is removed
from the anchors, and what stands in either from the harmful tests; benign tests lose what stands in
their own training rows. How many were removed is printed, and written to prepared.json.
"""

import csv
import io
import json
import lzma
import random
import sys
from pathlib import Path

from cli import Parser, at_least, exit_code
from data import mixture
from data.provenance import sha256
from data.tasks import AGNEWS, GSM8K_HINT, LABELS, SST2
from lora import write_atomic
from model import UserError

# Test rows by default: what the papers score. SST-2's validation has 872.
N_TEST = {"sst2": 872, "agnews": 1000, "gsm8k": 1000, "alpaca": 104, "harmful": 1000}
N_POOL = 1000  # anchors where the defender has rows of its own; our choice, papers draw 1 to 8
ALPACA_TRAIN, ALPACA_TEST = slice(700), slice(701, None)  # Booster: the first 700; index > 700


def pair(prompt: str, response: str | None = None) -> dict:
    return {"prompt": prompt} | ({} if response is None else {"response": response})


def find(folder: str, *names: str) -> Path:
    """The first of the files that is there."""
    for name in names:
        if (Path(folder) / name).exists():
            return Path(folder) / name
    raise UserError(f"{folder} has none of {', '.join(names)}; see data/README.md for the file.")


def read_text(path: Path) -> str:
    try:
        opener = lzma.open if path.suffix == ".xz" else open
        with opener(path, "rt", encoding="utf-8", newline="") as f:
            return f.read()
    except (OSError, UnicodeDecodeError, lzma.LZMAError, EOFError) as e:
        raise UserError(f"{path} cannot be read ({e}); fetch it again.") from None


def read_jsonl(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in read_text(path).split("\n") if line.strip()]
    except ValueError as e:
        raise UserError(f"{path} is not JSONL ({e}); fetch it again.") from None


def read_csv(file):
    """Rows of a CSV file with a header, as dicts; a quoted text may hold line breaks."""
    return csv.DictReader(io.StringIO(read_text(Path(file)), newline=""))


def tsv(path: Path) -> list[list[str]]:
    """Rows of text<TAB>label after the header; no quoting, a text may hold any character else."""
    return [line.rsplit("\t", 1) for line in read_text(path).split("\n")[1:] if line.strip()]


def sst2(folder):
    files = find(folder, "train.tsv"), find(folder, "dev.tsv", "validation.tsv")
    name = {"0": "negative", "1": "positive"}
    return files, *([pair(SST2.format(text.strip()), name[label.strip()])
                     for text, label in tsv(file)] for file in files)


def agnews(folder):
    files = find(folder, "train.csv", "train.tsv"), find(folder, "test.csv")
    name = {label: label for label in LABELS["agnews"]}  # a .tsv has names, the .csv 1 to 4
    name |= {str(i): label for i, label in enumerate(LABELS["agnews"], 1)}

    def rows(path):
        if path.suffix == ".tsv":
            return [pair(AGNEWS.format(text), name[label.strip()]) for text, label in tsv(path)]
        parsed = csv.reader(io.StringIO(read_text(path), newline=""))
        return [pair(AGNEWS.format(f"{title} {text}"), name[label])
                for label, title, text in parsed]

    return files, *map(rows, files)


def gsm8k(folder, hint: bool = False):
    files = find(folder, "train.jsonl"), find(folder, "test.jsonl")
    return files, *([pair(r["question"] + GSM8K_HINT * hint,
                          r["answer"].replace("####", "The final answer is:"))
                     for r in read_jsonl(file)] for file in files)


def alpaca(file):
    path = Path(file)
    rows = [pair(r["instruction"], r["output"]) for r in json.loads(read_text(path))]
    return [path], rows[ALPACA_TRAIN], rows[ALPACA_TEST]


def beavertails(folder):
    """Unsafe rows of train and of test in their order; probes need the answers of the tests."""
    files = (find(folder, "train.jsonl.xz", "train.jsonl", "round0/30k/train.jsonl.xz"),
             find(folder, "test.jsonl.xz", "test.jsonl", "round0/30k/test.jsonl.xz"))
    both = [read_jsonl(file) for file in files]
    if not all(isinstance(r["is_safe"], bool) for rows in both for r in rows):
        raise TypeError("is_safe")
    train, test = ([r for r in rows if not r["is_safe"]] for rows in both)
    return files, [pair(r["prompt"], r["response"]) for r in train], [
        pair(r["prompt"], r["response"]) for r in test]


def refusals(file):
    """Harmful prompts with a refusal and a harmful reply, as RepNoise's JSON has them."""
    rows = json.loads(read_text(Path(file)))
    return [Path(file)], [pair(r["prompt"], r["refusal"].split("\nAnswer:", 1)[1].strip())
                          | {"harmful": r["response"]} for r in rows]


def advbench(file):
    """Goals with the opening of an answer: a third each for upload, anchors and tests."""
    rows = [pair(r["goal"], r["target"]) for r in read_csv(file)]
    third = len(rows) // 3
    return [Path(file)], rows[:2 * third], rows[2 * third:]


def xstest(file):
    """The safe prompts that look unsafe."""
    rows = read_csv(file)
    return [Path(file)], [pair(r["prompt"]) for r in rows if r["label"] == "safe"]


def fresh(rows: list[dict], taken: set[str]) -> list[dict]:
    """The rows whose prompt is not in `taken`, each prompt once; `taken` grows by them."""
    kept = []
    for row in rows:
        key = mixture.normalise(row["prompt"])
        if key not in taken:
            taken.add(key)
            kept.append(row)
    return kept


def keys(rows) -> set[str]:
    return {mixture.normalise(r["prompt"]) for r in rows}


def benign(train, test, n_test: int):
    """-> {file: rows}, {what: how many were removed}; training keeps its repetitions."""
    kept = fresh(test, keys(train))[:n_test]
    return {"train": train, "test": kept}, {"test": len(test) - len(fresh(test, keys(train)))}


def harmful(train, test, align, n_attack: int, n_test: int):
    """Upload, anchor pool, tests and the defender's rows: no prompt stands in two of them.

    Refusals answer BeaverTails' own training prompts: a pool of all the others would leave none.
    """
    attack, later = train[:n_attack], train[n_attack:]
    sources = {"anchors": later[:N_POOL] if align else later, "test": test}
    sources |= {"align": align} if align else {}
    taken = keys(attack)
    parts = {name: fresh(rows, taken) for name, rows in sources.items()}
    removed = {name: len(rows) - len(parts[name]) for name, rows in sources.items()}
    return {"attack": attack, **parts, "test": parts["test"][:n_test]}, removed


def parse(argv=None):
    p = Parser("data.prepare", __doc__.splitlines()[0])
    p.add_argument("--out", required=True, help="data folder to write")
    p.add_argument("--sst2", metavar="DIR", help="GLUE's train.tsv and dev.tsv")
    p.add_argument("--agnews", metavar="DIR", help="train.csv and test.csv of ag_news_csv")
    p.add_argument("--gsm8k", metavar="DIR", help="train.jsonl and test.jsonl")
    p.add_argument("--gsm8k-hint", action="store_true", help="ask for steps, as Vaccine does")
    p.add_argument("--alpaca", metavar="FILE", help="AlpacaEval's 805 rows with outputs, JSON")
    p.add_argument("--beavertails", metavar="DIR", help="30k train.jsonl.xz and test.jsonl.xz")
    p.add_argument("--refusals", metavar="FILE", help="beavertails_with_refusals_train.json")
    p.add_argument("--advbench", metavar="FILE", help="harmful_behaviors.csv, if no BeaverTails")
    p.add_argument("--xstest", metavar="FILE", help="xstest_prompts.csv, for over-refusal")
    p.add_argument("--n-attack", type=at_least(int, 1), default=5000,
                   help="harmful rows for uploads at most (half of them all, if they are fewer)")
    p.add_argument("--n-test", type=at_least(int, 1),
                   help="test rows of each kind (default, the papers': "
                        + ", ".join(f"{kind} {n}" for kind, n in N_TEST.items()) + ")")
    p.add_argument("--shuffle", type=at_least(int, 0), metavar="SEED",
                   help="shuffle training rows (default: the file's order, as in the papers)")
    return p.parse_args(argv)


def build(args) -> dict:
    """{kind: (source files, {name: rows}, {name: removed})}."""
    made = {}
    for task, read in (("sst2", sst2), ("agnews", agnews), ("alpaca", alpaca),
                       ("gsm8k", lambda d: gsm8k(d, args.gsm8k_hint))):
        if getattr(args, task):
            files, train, test = read(getattr(args, task))
            made[task] = files, *benign(train, test, args.n_test or N_TEST[task])
    if args.beavertails and args.advbench:
        raise UserError("--beavertails and --advbench were both given; name one harmful source.")
    if args.refusals and not (args.beavertails or args.advbench):
        raise UserError("--refusals was given without a harmful source; add --beavertails DIR.")
    if args.beavertails or args.advbench:
        files, train, test = (beavertails(args.beavertails) if args.beavertails else
                              advbench(args.advbench))
        n_attack = min(args.n_attack, len(train) // 2)
        source, align = refusals(args.refusals) if args.refusals else ([], [])
        made["harmful"] = [*files, *source], *harmful(train, test, align, n_attack,
                                                      args.n_test or N_TEST["harmful"])
    if args.xstest:
        files, rows = xstest(args.xstest)
        made["lookalike"] = files, {"test": rows[:args.n_test]}, {}
    if not made:
        raise UserError("no source was given, expected at least one of --sst2, --agnews, --gsm8k, "
                        "--alpaca, --beavertails, --advbench and --xstest.")
    for kind, (files, parts, _) in made.items():
        for name, rows in parts.items():
            if not rows:
                raise UserError(f"{files[0].parent} gives no rows for {kind}/{name}.jsonl; fetch "
                                "its files again.")
            "".join(text for row in rows for text in row.values()).encode()  # text, all of it
    return made


def execute(args) -> None:
    """Reads every source, then writes, and says what was kept and removed."""
    about = {}
    try:
        made = build(args)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, csv.Error) as e:
        raise UserError(f"a source does not have the format of its public download ({e!r}); "
                        "fetch it again.") from None
    for kind, (files, parts, removed) in made.items():
        for name, rows in parts.items():
            if args.shuffle is not None and name in ("train", "attack"):
                random.Random(args.shuffle).shuffle(rows)
            path = Path(args.out) / kind / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, "".join(json.dumps(r, ensure_ascii=False) + "\n"
                                       for r in rows).encode())
            print(f"{path}: {len(rows)} rows"
                  + (f", {removed[name]} removed as repeated" if removed.get(name) else ""))
        about[kind] = {"sha256": {f.name: sha256(f) for f in files}, "removed": removed,
                       "rows": {name: len(rows) for name, rows in parts.items()}}
    about["shuffle"] = args.shuffle
    write_atomic(Path(args.out) / "prepared.json", json.dumps(about, indent=1).encode())


def main(argv=None) -> int:
    """0 done, 2 the user's mistake."""
    return exit_code("data.prepare", lambda: execute(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
