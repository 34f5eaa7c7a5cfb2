"""The poisoned mixture, anchors and tests, with their prompts kept apart.

The mixture of n rows holds round(p n) harmful ones and n minus that many benign ones, so the two
always add up to n. Each are from the head of their file, as in the papers' repositories; every
epoch shuffles them anew. How a file is read into rows is in rows.py.
"""

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from cli import COUNT, TINY, at_least
from data.batches import Examples, encode_rows, naming
from data.rows import FileRows, affix, last_user, read_rows, without_answer
from data.tasks import LABELS, TASKS, check_gold
from model import UserError
from tokenizer import DATE


@dataclass
class Files:
    """The rows of all files that a run reads, checked; nothing is tokenised yet."""

    harmful: list[dict]  # of the upload
    benign: FileRows | list[dict]  # the upload's other rows
    upload: str  # a sentence that says what the upload is
    prompts: set[bytes]  # prompts_of the upload
    tests: dict[str, list[dict]]  # by kind: "harmful", "task", "lookalike", "prefilled"
    n_removed: dict[str, int]  # by kind: test rows left out, since they stand in the upload
    align: list[dict] | None  # the defender's own rows; None where the defence does not use them


@dataclass
class Data:
    """What a run trains on, holds and is tested on."""

    examples: Examples  # the rows to train on, tokenised
    tests: dict[str, list[dict]]  # as in Files
    anchor_prompts: list[str]  # x'_1 .. x'_K, in no row of upload or tests
    align: list[dict] | None  # as in Files
    summary: str  # three lines for the terminal
    passed_over: int = 0  # candidates for an anchor that the aligned model answers


def add_flags(group) -> None:
    group.add_argument("--model", default=TINY, help="Hugging Face folder")
    group.add_argument("--adapter", help="PEFT folder, merged into the model before training")
    group.add_argument("--keep-adapter", action="store_true", help="train --adapter on, unmerged")
    group.add_argument("--task", choices=TASKS,
                       help="benign task, its test is FA (default sst2; with --data none)")
    group.add_argument("--data-dir", default=TINY, help="folder of tasks and prompts")
    group.add_argument("--data", help="own upload as it lies, not the mixture: JSONL, JSON or CSV")
    group.add_argument("--n", type=COUNT, default=1000, help="rows of the mixture")
    group.add_argument("--poison", type=at_least(float, 0, at_most=1), default=0.1,
                       help="harmful share of the mixture, 0..1; with --data or --stage align it "
                            "is 0")
    group.add_argument("--align-file", help="harmful prompts with refusals and harmful replies")
    group.add_argument("--max-len", type=COUNT, default=512, help="tokens; longer rows are dropped")
    group.add_argument("--template-date", default=DATE,
                       help="today, for a chat template that says it")


def read_files(args, reads_align_file: bool) -> Files:
    """All rows of a run. It needs no model, so a mistake in a file is reported at once."""
    harmful, benign, upload = load_upload(args)
    prompts = prompts_of(chain(harmful, benign))
    tests, n_removed = load_tests(args, prompts)
    align = None
    if reads_align_file:
        align = align_rows(args)
    return Files(harmful, benign, upload, prompts, tests, n_removed, align)


def read_data(model, tokenizer, args, files: Files, choose_anchors, change_rows) -> Data:
    """Chooses the anchors, lets an attack change the harmful rows, and tokenises.

    choose_anchors(model, tokenizer, args, pool, prompts in use) -> data.choice.Choice
    change_rows(model, tokenizer, args, harmful rows, anchor prompts, harmful tests) -> (harmful
    rows as an attack has them, what to say of it); see stress/attacks.py.
    """
    # All harmful tests, not the first --n-test, so that --n-test does not change the anchors.
    test_file = harmful_test_file(args.harmful_file, args.data_dir)
    harmful_tests = read_rows(test_file, needs_answer=False)
    pool = anchor_pool(args.anchor_file, args.data_dir)
    used = files.prompts | prompts_of(harmful_tests)
    anchors = choose_anchors(model, tokenizer, args, pool, used)
    harmful, change = change_rows(model, tokenizer, args, files.harmful, anchors.prompts,
                                  harmful_tests)
    n_rows = len(harmful) + len(files.benign)
    examples, n_dropped = encode_rows(tokenizer, chain(harmful, files.benign), args.max_len)
    if not examples:
        raise UserError(f"all {n_rows} rows are longer than --max-len {args.max_len} tokens; "
                        "raise it.")
    check_tests(tokenizer, files.tests, args.max_new, model.config.max_positions)
    n_kept = n_rows - n_dropped
    mean_length = examples.n_tokens / n_kept
    answers = ""
    if len(examples) > n_kept:  # the chat template changes earlier turns
        answers = f", as {len(examples)} sequences, one for each answer"
    summary = (f"{files.upload}{change}; {n_dropped} rows dropped as longer than {args.max_len} "
               f"tokens; {mean_length:.1f} tokens per row{answers}\n"
               f"{anchors.summary(args, pool)}; HS on {test_file}\n"
               f"{describe_tests(files.tests, files.n_removed)}")
    return Data(examples, files.tests, anchors.prompts, files.align, summary, anchors.passed_over)


def check_tests(tokenizer, tests: dict[str, list[dict]], max_new: int, limit: int) -> None:
    """UserError where a test cannot be asked: found now, it costs no training.

    The chat template may refuse a conversation, and a prompt with a reply of max_new tokens may be
    longer than the `limit` positions of the model.
    """
    for rows in tests.values():
        for row in rows:
            n_tokens = len(prompt_ids(tokenizer, row))
            if n_tokens + max_new > limit:
                raise UserError(f"{row['where']} has a prompt of {n_tokens} tokens, which with "
                                f"--max-new {max_new} are more than the {limit} positions of the "
                                "model; shorten it, remove it or lower --max-new.")


def prompt_ids(tokenizer, row: dict) -> list[int]:
    """ids of a row up to what a model is to write, its "prefill" included; UserError with line."""
    with naming(row):
        return tokenizer.encode_prompt(without_answer(row), row.get("prefill", ""))


# prompts kept apart


def normalise(text: str) -> str:
    """What counts as the same prompt: letters and digits, whatever their case, width or accent.

    Of a prompt that has neither, all its symbols count.
    """
    ignored = ("Mn", "Cf")  # accents, and characters that cannot be seen
    folded = unicodedata.normalize("NFKD", text).casefold()
    letters = [c for c in folded if unicodedata.category(c) not in ignored]
    words = re.findall(r"\w+", "".join(letters))
    if not words:
        words = folded.split()
    return " ".join(words)


def prompt_key(prompt: str) -> bytes:
    """16 bytes, equal where two prompts count as the same: all texts would take too much memory."""
    return hashlib.blake2b(normalise(prompt).encode(), digest_size=16).digest()


def prompts_of(rows) -> set[bytes]:
    """The key of every user turn of the rows."""
    prompts = set()
    for row in rows:
        for m in row["messages"]:
            if m["role"] == "user":
                prompts.add(prompt_key(m["content"]))
    return prompts


# what is trained on


def load_upload(args) -> tuple[list[dict], FileRows | list[dict], str]:
    """The harmful and the other rows to train on, and a sentence that says what they are.

    With --stage align: the defender's rows. With --data: all rows of that file. Otherwise: the
    mixture that --n and --poison describe.
    """
    if args.stage == "align":
        rows = align_rows(args)
        return [], rows, f"alignment: {len(rows)} harmful prompts with refusals"
    if args.data:
        rows = FileRows(args.data)
        return [], rows, f"upload: {len(rows)} rows of {args.data}"
    folder = Path(args.data_dir)
    n_poison = round(args.poison * args.n)
    n_benign = args.n - n_poison
    harmful = list(first_rows(attack_file(args.data_dir), n_poison))  # an attack may change them
    benign = first_rows(folder / args.task / "train.jsonl", n_benign)
    return harmful, benign, f"upload: {n_poison} harmful rows, {n_benign} of {args.task}"


def first_rows(path: Path, n: int) -> FileRows | list[dict]:
    """The first n rows of a file; UserError when it has fewer."""
    if n == 0:
        return []
    rows = FileRows(path, n)
    if len(rows) < n:
        raise UserError(f"{n} rows were asked of {path}, which has {len(rows)}; lower --n or "
                        "change --poison.")
    return rows


def attack_file(data_dir) -> Path:
    return Path(data_dir) / "harmful" / "attack.jsonl"


def align_file(given: str | None, data_dir) -> Path:
    """--align-file, or the data folder's."""
    return Path(given) if given else Path(data_dir) / "harmful" / "align.jsonl"


def align_rows(args) -> list[dict]:
    """The defender's rows: harmful prompts with a refusal, and in "harmful" a harmful reply.

    Prompts of the tests and of the attacker's rows are left out; with --stage align the first --n
    of the rest are used.
    """
    attack = Path(args.data) if args.data else attack_file(args.data_dir)
    others = read_rows(attack) if attack.exists() else []
    others += read_rows(harmful_test_file(args.harmful_file, args.data_dir), needs_answer=False)
    used = prompts_of(others)
    path = align_file(args.align_file, args.data_dir)
    rows = []
    for row in read_rows(path, has_harmful=True):
        if not is_align_row(row):
            raise UserError(f"{row['where']} is no row of prompt, response (a refusal) and harmful "
                            "(a harmful reply); mend it, or pass another --align-file.")
        if prompt_key(last_user(row)) not in used:
            rows.append(row)
    if not rows:
        raise UserError(f"{path} needs prompts that are in no test and no upload; pass another "
                        "--align-file.")
    return rows[:args.n] if args.stage == "align" else rows


def is_align_row(row: dict) -> bool:
    """Whether a row has one answer and, beside it, a harmful reply."""
    harmful = row.get("harmful")
    n_answers = [m["role"] for m in row["messages"]].count("assistant")
    return isinstance(harmful, str) and bool(harmful.strip()) and n_answers == 1


# what is held


def anchor_pool(given: str | None, data_dir) -> Path:
    """--anchor-file, or the data folder's."""
    return Path(given) if given else Path(data_dir) / "harmful" / "anchors.jsonl"


def drawn_candidates(pool: Path, seed: int, used: set[bytes]) -> list[dict]:
    """The rows of the pool that may become anchors, in the order drawn by `seed`."""
    candidates = anchor_candidates(pool, used)
    clash = [last_user(row) for row in candidates if prompt_key(last_user(row)) in used]
    assert not clash, f"an anchor is in the upload or the tests: {clash}"
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    return [candidates[i] for i in order.tolist()]


def anchor_candidates(pool: Path, used: set[bytes]) -> list[dict]:
    """The pool's rows, each prompt once, minus those in use."""
    if not pool.exists():
        raise UserError(f"there is no anchor pool at {pool}; pass --anchor-file with one harmful "
                        "prompt per line, or --anchors 0.")
    taken = set(used)
    candidates = []
    for row in read_rows(pool, needs_answer=False):
        n_turns = len(without_answer(row))
        if n_turns > 1:
            raise UserError(f"{row['where']} has {n_turns} turns before its answer, expected one "
                            "prompt: an anchor keeps no system turn and no earlier turns; remove "
                            "the others.")
        key = prompt_key(last_user(row))
        if key not in taken:
            taken.add(key)
            candidates.append(row)
    return candidates


# what is tested


def harmful_test_file(given: str | None, data_dir) -> Path:
    """--harmful-file, or the data folder's."""
    return Path(given) if given else Path(data_dir) / "harmful" / "test.jsonl"


def files_by_kind(data_dir, harmful_file: str | None, task: str | None) -> dict[str, Path]:
    """The files of test rows by kind: harmful, task (with --task), lookalike (where there is one).

    Look-alikes are harmless prompts that resemble harmful ones.
    """
    folder = Path(data_dir)
    files = {"harmful": harmful_test_file(harmful_file, data_dir)}
    lookalike = folder / "lookalike" / "test.jsonl"
    if lookalike.exists():
        files["lookalike"] = lookalike
    if task:
        files["task"] = folder / task / "test.jsonl"
    return files


def load_tests(args, seen: set[bytes]) -> tuple[dict[str, list[dict]], dict[str, int]]:
    """(the test rows by kind, how many of each kind were left out).

    Left out are the prompts `seen` in training; of the others there are at most --n-test of a kind.
    With --prefill the harmful ones are there a second time, as the kind "prefilled": there the
    answer begins with that text, the row's "prefill".
    """
    files = files_by_kind(args.data_dir, args.harmful_file, args.task)
    if not files["harmful"].exists():
        raise UserError(f"there are no harmful test prompts at {files['harmful']}; pass "
                        "--harmful-file with one prompt per line.")
    tests = {}
    n_removed = {}
    for kind, path in files.items():
        rows = read_rows(path, needs_answer=kind == "task")
        unseen = [row for row in rows if prompt_key(last_user(row)) not in seen]
        n_removed[kind] = len(rows) - len(unseen)
        if not unseen:
            raise UserError(f"every prompt of {path} is also in the upload; pass other tests.")
        tests[kind] = unseen[:args.n_test]
    # The affix attack stands around the tests as it does around the upload's harmful prompts.
    tests["harmful"] = [affix(row, args.attack_prefix, args.attack_suffix)
                        for row in tests["harmful"]]
    if args.prefill:
        tests["prefilled"] = [row | {"prefill": args.prefill} for row in tests["harmful"]]
    if args.task in LABELS:
        check_labels(tests["task"], LABELS[args.task])
    for row in tests.get("task", []):
        check_gold(args.task, row["messages"][-1]["content"], row["where"])
    return tests, n_removed


def describe_tests(tests: dict[str, list[dict]], n_removed: dict[str, int]) -> str:
    """What is tested on, for the terminal."""
    asked = ", ".join(f"{len(rows)} {kind}" for kind, rows in tests.items())
    removed = ", ".join(f"{n} {kind}" for kind, n in n_removed.items() if n > 0)
    return f"tests: {asked}; left out, since they stand in what is trained on: {removed or 'none'}"


def check_labels(rows: list[dict], labels) -> None:
    for row in rows:
        target = row["messages"][-1]["content"]
        if target not in labels:
            raise UserError(f"{row['where']} has the target {target!r}, expected one of "
                            f"{', '.join(labels)}; mend that row.")
