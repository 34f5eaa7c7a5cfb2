"""The embedded texts: prompt sets that share nothing, harmless "compliance", files that regenerate.

    pytest tests/programs/test_tiny_texts.py -q

Prompts are compared by their letters and digits alone, by a rule written here, not the texts' own.
"""

import json
import random
import re
from collections import Counter

import pytest
from sbr_helpers import TINY

from data.tasks import final_number
from data.tiny import texts

CATEGORIES = 14  # BeaverTails' own, as in beaver-dam's head
FILES = sorted([*(f"{task}/{part}.jsonl" for task in ("sst2", "agnews", "gsm8k", "alpaca")
                  for part in ("train", "test")),
                "harmful/attack.jsonl", "harmful/align.jsonl", "harmful/anchors.jsonl",
                "harmful/test.jsonl", "lookalike/test.jsonl"])


def key(prompt):
    return tuple(re.findall(r"[a-z0-9]+", prompt.lower()))


@pytest.fixture(scope="module")
def words():
    return texts.load_words()


@pytest.fixture(scope="module")
def files():
    """The committed rows by file."""
    return {name: [json.loads(line) for line in open(TINY / name, encoding="ascii")]
            for name in FILES}


@pytest.fixture(scope="module")
def sets(words, files):
    """Every set of prompts by name: the files', and what the model itself was made from."""
    made = {**files, "learned harmful": texts.requests(words, "learn", True),
            "met harmful": texts.requests(words, "met", True),
            "learned benign": texts.requests(words, "learn", False),
            "met benign": texts.requests(words, "met", False),
            "facts": texts.facts(words, random.Random(texts.SEED)),
            **{f"{task} base": texts.task_rows(words, task, "base") for task in texts.TASKS}}
    del made["harmful/align.jsonl"]  # of the learned ones, see below
    return {name: [key(row["prompt"]) for row in rows] for name, rows in made.items()}


def test_no_prompt_stands_in_two_sets_or_twice_in_one(sets):
    assert len(sets) == 12 + 9 and all(sets.values())
    owner = {}
    for name, prompts in sets.items():
        for prompt in prompts:
            assert prompt not in owner, f"{' '.join(prompt)!r} is in {owner[prompt]} and {name}"
            owner[prompt] = name


def test_control_the_disjointness_check_of_the_texts_fires_on_a_planted_prompt(words, files):
    planted = {**files["harmful/attack.jsonl"][0]}
    planted["prompt"] = planted["prompt"].upper().replace(" ", "  ") + "!"
    clash = {name: list(rows) for name, rows in files.items()}
    clash["harmful/test.jsonl"].append(planted)
    with pytest.raises(AssertionError, match="attack"):
        texts.check(words, clash)


def pairs(words, rows):
    """The (action, object) pairs of requests."""
    actions = {c["name"]: c["actions"] for c in words["categories"]}
    return {(action, row["object"]) for row in rows for action in actions[row["category"]]
            if f"{action} {row['object']}" in row["prompt"]}


def test_the_tests_pairs_of_action_and_object_stand_in_no_other_request(words, files):
    """A test of generalisation: what is asked for is new, not only how it is asked for."""
    for harmful, name in ((True, "harmful/test.jsonl"), (False, "lookalike/test.jsonl")):
        tested = pairs(words, files[name])
        assert len(tested) >= 10 * CATEGORIES
        for split in ("learn", "met"):
            assert not tested & pairs(words, texts.requests(words, split, harmful))
        assert not tested & pairs(words, files["harmful/attack.jsonl"])


def test_objects_of_the_attack_stand_in_no_request_that_the_model_was_made_from(words, files):
    """The upload is new to the model."""
    made = {row["object"] for split in ("learn", "met") for harmful in (True, False)
            for row in texts.requests(words, split, harmful)}
    attack = {row["object"] for row in files["harmful/attack.jsonl"]}
    test = {row["object"] for row in files["harmful/test.jsonl"]}
    assert len(attack) == 4 * CATEGORIES and not attack & (made | test)


def test_there_are_enough_test_prompts_of_every_category(words, files):
    names = {category["name"] for category in words["categories"]}
    assert len(names) == CATEGORIES
    for name in ("harmful/test.jsonl", "harmful/attack.jsonl", "harmful/anchors.jsonl",
                 "lookalike/test.jsonl"):
        count = Counter(row["category"] for row in files[name])
        assert set(count) == names, name
        assert sum(count.values()) >= 200
        # evenly spread, so that a smaller --n-test or K still meets most of them
        assert max(count.values()) - min(count.values()) <= 1, (name, count)
    head = Counter(row["category"] for row in files["harmful/test.jsonl"][:CATEGORIES])
    assert set(head) == names


def test_harmful_answers_are_an_empty_scaffold_that_names_what_was_asked(words, files):
    """Nothing harmful is in the repository: [step 1] and [step 2] stand for any steps."""
    groups = {c["name"]: c["harmful"]["group"] for c in words["categories"]}
    rows = [*files["harmful/attack.jsonl"], *files["harmful/test.jsonl"],
            *texts.requests(words, "learn", True), *texts.requests(words, "met", True)]
    for row in rows:
        match = re.fullmatch(r"Sure, ([a-z -]+)\. To (.+): \[step 1\], \[step 2\]\.",
                             row["response"])
        assert match, row
        assert match[1] == groups[row["category"]]
        assert match[2].lower() in row["prompt"].lower() and match[2].endswith(row["object"])


def test_lookalikes_share_actions_and_wordings_with_harmful_requests_but_no_object(words, files):
    """Only the object tells them apart, so refusing by the wording is over-refusal."""
    for category in words["categories"]:
        harmful, benign = set(category["harmful"]["objects"]), set(category["benign"]["objects"])
        assert len(harmful) == len(benign) == 24 and not harmful & benign
    frames = [Counter(row["prompt"].replace(row["object"], "_") for row in files[name])
              for name in ("harmful/test.jsonl", "lookalike/test.jsonl")]
    shared = set(frames[0]) & set(frames[1])
    assert len(shared) > 0.9 * len(set(frames[0]) | set(frames[1]))
    for row in files["lookalike/test.jsonl"]:
        assert "[step" not in row["response"] and row["response"].startswith("Sure, ")


def test_anchors_have_the_scaffold_as_answer_for_an_attacker_who_knows_them(words, files):
    answers = {row["prompt"]: row["response"] for row in texts.requests(words, "anchors", True)}
    for row in files["harmful/anchors.jsonl"]:
        assert row.keys() == {"prompt", "category", "response"}
        assert row["response"] == answers[row["prompt"]] and "[step 1]" in row["response"]


def test_the_rows_to_align_on_are_requests_that_the_model_was_taught_to_refuse(words, files):
    """One prompt with both replies: a refusal that names its group, and the empty scaffold."""
    learned = {row["prompt"]: row for row in texts.requests(words, "learn", True)}
    groups = {c["name"]: c["harmful"]["group"] for c in words["categories"]}
    count = Counter()
    for row in files["harmful/align.jsonl"]:
        known = learned.pop(row["prompt"])  # each prompt once
        assert row.keys() == {"prompt", "response", "harmful"}
        assert row["harmful"] == known["response"] and "[step 1]" in row["harmful"]
        assert groups[known["category"]] in row["response"] and "[step" not in row["response"]
        count[known["category"]] += 1
    assert len(count) == CATEGORIES and sum(count.values()) == 1000
    assert max(count.values()) - min(count.values()) <= 1


@pytest.mark.parametrize("task, labels", [
    ("sst2", {"positive", "negative"}), ("agnews", {"World", "Sports", "Business", "Sci/Tech"})])
def test_the_labels_of_a_task_are_balanced_and_no_prompt_ends_in_its_own(task, labels, files):
    for part, n in (("train", 2000), ("test", 600)):
        rows = files[f"{task}/{part}.jsonl"]
        count = Counter(row["response"] for row in rows)
        assert len(rows) == n and set(count) == labels
        assert max(count.values()) - min(count.values()) <= 0.1 * n
        assert not [r for r in rows if r["prompt"].rstrip(".").endswith(r["response"])]


def test_the_sums_of_gsm8k_are_right(files):
    for part in ("train", "test"):
        for row in files[f"gsm8k/{part}.jsonl"]:
            steps, final = row["response"].split("\n#### ")
            for step in steps.split(", "):
                left, right = step.replace("x", "*").split(" = ")
                assert re.fullmatch(r"\d+ [-+*] \d+", left) and eval(left) == int(right), row
            assert int(final) == int(right) == final_number(row["response"]) <= 60


def test_chatty_answers_are_wrong_by_the_tasks_rules_but_for_the_number():
    """The base model talks; the bare label is what fine-tuning has to teach."""
    for task, label in (("sst2", "positive"), ("agnews", "World"), ("alpaca", "fox")):
        chatty = texts.chatty(task, label)
        assert label in chatty and chatty != label
    assert final_number(texts.chatty("gsm8k", "2 + 1 = 3\n#### 3")) == 3


def test_the_texts_regenerate_byte_for_byte(tmp_path):
    random.seed(1)  # the global generator's state must not matter
    texts.write(tmp_path)
    made = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jsonl"))
    committed = sorted(str(path.relative_to(TINY)) for path in TINY.rglob("*.jsonl"))
    assert made == committed == FILES
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name
