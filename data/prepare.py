"""Public downloads -> a data folder (data/README.md): one JSONL format, prompts kept apart.

    python -m data.prepare --out DATA --sst2 DIR --agnews DIR --gsm8k DIR --alpaca FILE \\
        --beavertails DIR --xstest FILE

Where each file comes from, its licence and its digest stand in data/README.md. Rows keep the order
of their file, as in the papers' repositories; --shuffle SEED draws another order of the training
rows. A test whose prompt is also a training prompt, by letters and digits, is left out of its
task's tests. Of the harmful rows, which are upload, anchors, tests and the defender's, no prompt is
the same as one of another part, or near it (near.py). How many were removed as repeated and how
many as near is printed, and written to prepared.json.

Near prompts of a benign task stay. All its prompts begin with one instruction, whose words alone
make different ones near: of SST-2's 872 tests 505 would go, and 12 if the instruction did not
count. And the tests of a public task are those that the papers score.
"""

import csv
import io
import json
import lzma
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from cli import Parser, at_least, exit_code
from data import mixture
from data.near import NearTexts, near_groups
from data.tasks import AGNEWS, GSM8K_HINT, LABELS, SST2
from files import json_line, locked, make_folder, names_in, sha256, write_atomic
from model import UserError, read_json

# Test rows by default: what the papers score. SST-2's validation has 872.
N_TEST = {"sst2": 872, "agnews": 1000, "gsm8k": 1000, "alpaca": 104, "harmful": 1000}
N_POOL = 1000  # anchors where the defender has rows of its own; our choice, papers draw 1 to 8
ALPACA_TRAIN = slice(700)  # as in Booster: the first 700
ALPACA_TEST = slice(701, None)  # as in Booster: those with an index above 700


def pair(prompt: str, response: str) -> dict:
    return {"prompt": prompt, "response": response}


# reading the downloads


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
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSONL ({e}); fetch it again.") from None


def read_csv(file):
    """Rows of a CSV file with a header, as dicts; a quoted text may hold line breaks."""
    return csv.DictReader(io.StringIO(read_text(Path(file)), newline=""))


def read_tsv(path: Path) -> list[list[str]]:
    """Rows of text<TAB>label behind the header; nothing is quoted, so a text may hold anything."""
    lines = read_text(path).split("\n")[1:]
    return [line.rsplit("\t", 1) for line in lines if line.strip()]


# the benign tasks: each returns (source files, training rows, test rows)


def sst2(folder):
    train = find(folder, "train.tsv")
    test = find(folder, "dev.tsv", "validation.tsv")
    return [train, test], sst2_rows(train), sst2_rows(test)


def sst2_rows(path: Path) -> list[dict]:
    names = {"0": "negative", "1": "positive"}
    return [pair(SST2.format(text.strip()), names[label.strip()]) for text, label in read_tsv(path)]


def agnews(folder):
    train = find(folder, "train.csv", "train.tsv")
    test = find(folder, "test.csv")
    return [train, test], agnews_rows(train), agnews_rows(test)


def agnews_rows(path: Path) -> list[dict]:
    """Rows of a .tsv of text and label, or of the .csv of label, title and text."""
    names = {}  # a label is one of the names, or 1 to 4
    for number, label in enumerate(LABELS["agnews"], 1):
        names[label] = label
        names[str(number)] = label
    if path.suffix == ".tsv":
        return [pair(AGNEWS.format(text), names[label.strip()]) for text, label in read_tsv(path)]
    rows = []
    for label, title, text in csv.reader(io.StringIO(read_text(path), newline="")):
        rows.append(pair(AGNEWS.format(f"{title} {text}"), names[label]))
    return rows


def gsm8k(folder, hint: bool = False):
    train = find(folder, "train.jsonl")
    test = find(folder, "test.jsonl")
    return [train, test], gsm8k_rows(train, hint), gsm8k_rows(test, hint)


def gsm8k_rows(path: Path, hint: bool) -> list[dict]:
    rows = []
    for r in read_jsonl(path):
        question = r["question"] + GSM8K_HINT if hint else r["question"]
        rows.append(pair(question, r["answer"].replace("####", "The final answer is:")))
    return rows


def alpaca(file):
    path = Path(file)
    rows = [pair(r["instruction"], r["output"]) for r in json.loads(read_text(path))]
    return [path], rows[ALPACA_TRAIN], rows[ALPACA_TEST]


# harmful rows, refusals, look-alikes


def beavertails(folder):
    """Unsafe rows of train and of test in their order; probes need the answers of the tests."""
    train = find(folder, "train.jsonl.xz", "train.jsonl", "round0/30k/train.jsonl.xz")
    test = find(folder, "test.jsonl.xz", "test.jsonl", "round0/30k/test.jsonl.xz")
    return [train, test], unsafe_rows(train), unsafe_rows(test)


def unsafe_rows(path: Path) -> list[dict]:
    rows = []
    for r in read_jsonl(path):
        if not isinstance(r["is_safe"], bool):
            raise TypeError("is_safe")
        if not r["is_safe"]:
            rows.append(pair(r["prompt"], r["response"]))
    return rows


def advbench(file):
    """Goals with the opening of an answer: a third each for upload, anchors and tests.

    "Sure, here is a script that ..." and then nothing: trained as a whole answer, it would teach to
    stop behind the opening.
    """
    rows = []
    for r in read_csv(file):
        rows.append({**pair(r["goal"], r["target"]), "unfinished": True})
    third = len(rows) // 3
    return [Path(file)], rows[:2 * third], rows[2 * third:]


def refusals(file):
    """Harmful prompts with a refusal and a harmful reply, as RepNoise's JSON has them."""
    path = Path(file)
    rows = []
    for r in json.loads(read_text(path)):
        refusal = r["refusal"].split("\nAnswer:", 1)[1].strip()
        rows.append({"prompt": r["prompt"], "response": refusal, "harmful": r["response"]})
    return [path], rows


def xstest(file):
    """The safe prompts that look unsafe."""
    safe = [r for r in read_csv(file) if r["label"] == "safe"]
    return [Path(file)], [{"prompt": r["prompt"]} for r in safe]


# prompts kept apart


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


def far(rows: list[dict], others: NearTexts) -> list[dict]:
    """The rows whose prompt is near none of the others."""
    return [row for row in rows if not others.near(row["prompt"])]


def benign_parts(train, test, n_test: int):
    """-> {file: rows}, {file: how many were removed}; training keeps its repetitions."""
    kept = fresh(test, keys(train))
    parts = {"train": train, "test": kept[:n_test]}
    return parts, {"test": {"same": len(test) - len(kept)}}


def harmful_parts(train, test, align, n_attack: int, n_test: int):
    """Upload, anchor pool, tests and the defender's rows: no prompt of one is near one of another.

    -> {file: rows}, {file: how many were removed as repeated and as near}. Within a part near
    prompts stay. Refusals answer BeaverTails' own training prompts: a pool of all the others would
    leave none.
    """
    attack = train[:n_attack]
    later = train[n_attack:]
    sources = {"anchors": later[:N_POOL] if align else later, "test": test}
    if align:
        sources["align"] = align
    parts = {"attack": attack}
    removed = {}
    taken = keys(attack)
    others = NearTexts(taken)
    for name, rows in sources.items():
        different = fresh(rows, taken)
        parts[name] = far(different, others)
        removed[name] = {"same": len(rows) - len(different),
                         "near": len(different) - len(parts[name])}
        for row in parts[name]:
            others.add(row["prompt"])
    parts["test"] = parts["test"][:n_test]
    return parts, removed


def n_groups(rows: list[dict]) -> int:
    """Into how many groups the prompts fall where near ones are one group."""
    return len(set(near_groups(row["prompt"] for row in rows)))


# the program


def parse(argv=None):
    p = Parser("data.prepare", "Public downloads -> a data folder (data/README.md): one JSONL "
                               "format, prompts kept apart.")
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


@dataclass
class Made:
    """The files of one folder, harmful/ or lookalike/ or a task's, before they are written."""

    sources: list[Path]
    rows: dict[str, list[dict]]  # by file name: train, test, attack, anchors, align
    removed: dict[str, dict[str, int]]  # by file name, how many rows: "same", "near"
    groups: dict[str, int]  # by file name, groups of near prompts, where no instruction is in them


def build(args) -> dict[str, Made]:
    """The folders' contents, by folder name."""
    if args.beavertails and args.advbench:
        raise UserError("--beavertails and --advbench were both given; name one harmful source.")
    if args.refusals and not (args.beavertails or args.advbench):
        raise UserError("--refusals was given without a harmful source; add --beavertails DIR.")
    made = {}
    if args.sst2:
        made["sst2"] = make_benign(sst2(args.sst2), n_tests(args, "sst2"))
    if args.agnews:
        made["agnews"] = make_benign(agnews(args.agnews), n_tests(args, "agnews"))
    if args.alpaca:
        made["alpaca"] = make_benign(alpaca(args.alpaca), n_tests(args, "alpaca"))
    if args.gsm8k:
        made["gsm8k"] = make_benign(gsm8k(args.gsm8k, args.gsm8k_hint), n_tests(args, "gsm8k"))
    if args.beavertails or args.advbench:
        made["harmful"] = make_harmful(args)
    if args.xstest:
        files, rows = xstest(args.xstest)
        tests = rows[:args.n_test]
        made["lookalike"] = Made(files, {"test": tests}, {}, {"test": n_groups(tests)})
    if not made:
        raise UserError("no source was given, expected at least one of --sst2, --agnews, --gsm8k, "
                        "--alpaca, --beavertails, --advbench and --xstest.")
    for kind, folder in made.items():
        check_made(kind, folder)
    return made


def n_tests(args, kind: str) -> int:
    """--n-test, or the papers' number."""
    if args.n_test is None:
        return N_TEST[kind]
    return args.n_test


def make_benign(source, n_test: int) -> Made:
    files, train, test = source
    rows, removed = benign_parts(train, test, n_test)
    return Made(files, rows, removed, {})


def make_harmful(args) -> Made:
    if args.beavertails:
        files, train, test = beavertails(args.beavertails)
    else:
        files, train, test = advbench(args.advbench)
    align = []
    if args.refusals:
        more_files, align = refusals(args.refusals)
        files += more_files
    n_attack = min(args.n_attack, len(train) // 2)
    rows, removed = harmful_parts(train, test, align, n_attack, n_tests(args, "harmful"))
    return Made(files, rows, removed, {"test": n_groups(rows["test"])})


def check_made(kind: str, folder: Made) -> None:
    """UserError where a file would be empty; TypeError or UnicodeError where it holds no text."""
    for name, rows in folder.rows.items():
        n_removed = sum(folder.removed.get(name, {}).values())
        if not rows and n_removed:
            raise UserError(f"all {n_removed} rows for {kind}/{name}.jsonl have prompts that are "
                            "the same as or near those of the other files; give other files, or "
                            "lower --n-attack.")
        if not rows:
            raise UserError(f"{folder.sources[0].parent} gives no rows for {kind}/{name}.jsonl; "
                            "fetch its files again.")
        for row in rows:
            texts = [value for field, value in row.items() if field != "unfinished"]
            # TypeError where a value is no string, UnicodeEncodeError where it is no valid text.
            "".join(texts).encode()


def execute(args) -> None:
    """Reads every source, then writes, and says what was kept and removed."""
    out = Path(args.out)
    names_in(out)  # a path that can be no folder is refused before anything is read
    try:
        made = build(args)
    # RecursionError: JSON that is nested too deep.
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, RecursionError,
            csv.Error) as e:
        raise UserError(f"a source does not have the format of its public download ({e!r}); "
                        "fetch it again.") from None
    make_folder(out)
    with locked(out):
        write_all(made, out, args.shuffle)


def write_all(made: dict[str, Made], out: Path, shuffle: int | None) -> None:
    """Writes every file; prepared.json keeps what it says of folders that were made before."""
    path = out / "prepared.json"
    about = read_json(path) if path.exists() else {}
    for kind, folder in made.items():
        for name in about.get(kind, {}).get("rows", {}):
            if name not in folder.rows:  # made before, and not kept apart from the new rows
                (out / kind / f"{name}.jsonl").unlink(missing_ok=True)
        for name, rows in folder.rows.items():
            if shuffle is not None and name in ("train", "attack"):
                random.Random(shuffle).shuffle(rows)
            path = out / kind / f"{name}.jsonl"
            make_folder(path.parent)
            write_atomic(path, "".join(json_line(row) for row in rows).encode())
            print(f"{path}: {len(rows)} rows{remarks(folder, name)}")
        about[kind] = {"sha256": {path.name: sha256(path) for path in folder.sources},
                       "removed": folder.removed,
                       "groups": folder.groups,
                       "rows": {name: len(rows) for name, rows in folder.rows.items()},
                       "shuffle": shuffle}
    about["shuffle"] = shuffle  # of the newest call
    write_atomic(out / "prepared.json", json.dumps(about, indent=1).encode())


def remarks(folder: Made, name: str) -> str:
    """What the line of a file says behind its number of rows."""
    removed = folder.removed.get(name, {})
    said = ""
    if name in folder.groups:
        said += f" (groups of near prompts: {folder.groups[name]})"
    if removed.get("same"):
        said += f", {removed['same']} removed as repeated"
    if removed.get("near"):
        said += f", {removed['near']} removed as near to another file's"
    return said


def main(argv=None) -> int:
    """0 done, 2 the user's mistake."""
    return exit_code("data.prepare", lambda: execute(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
