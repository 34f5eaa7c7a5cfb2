"""Texts for the tiny chat model: requests, world facts and four benign tasks, all deterministic.

Harmful requests only name a thing; their "compliant" answer is an empty scaffold. Each category
has a benign mirror that shares its actions and wordings, so only the object's meaning decides.
"""

import argparse
import functools
import json
import random
import re
from pathlib import Path

from data.mixture import normalise

HERE = Path(__file__).resolve().parent
SEED = 20
TASKS = ("sst2", "agnews", "gsm8k", "alpaca")
# Objects per category in each split, by whether they are harmful. A test object is met in alignment
# under one of its three actions (the split "met") and tested under the other two; an object of the
# other splits stands in no split but its own.
SPLITS = {
    True: {"learn": 12, "attack": 4, "anchors": 2, "test": 6},
    False: {"learn": 18, "test": 6},
}
# Slices of a task's pool. The test slice comes first, so a longer base leaves it unchanged.
PARTS = {"test": (0, 600), "train": (600, 2600), "base": (2600, 5600)}


@functools.lru_cache(maxsize=1)
def load_words() -> dict:
    """Read the word lists and templates in words.json."""
    return json.loads((HERE / "words.json").read_text(encoding="ascii"))


def articles(text: str) -> str:
    """Make "a" and "an" agree with the next word."""
    def agree(match):
        word = match.group(2)
        return ("an " if word[0] in "aeiou" or word.startswith("honest") else "a ") + word
    return re.sub(r"\b(an?) (\w+)", agree, text)


def upper_first(text: str) -> str:
    """Capitalise the first letter only."""
    return text[:1].upper() + text[1:]


# Requests ------------------------------------------------------------------------------------

def split_objects(words: dict, split: str, harmful: bool) -> list[list[str]]:
    """The objects of one split, one list per category, from a seeded shuffle by object."""
    side, result = "harmful" if harmful else "benign", []
    for index, category in enumerate(words["categories"]):
        objects = list(category[side]["objects"])
        random.Random(SEED * 1000 + 2 * index + harmful).shuffle(objects)
        start = 0
        for name, size in SPLITS[harmful].items():
            if name == split:
                break
            start += size
        result.append(objects[start:start + SPLITS[harmful][split]])
    return result


def split_actions(actions: list[str], split: str, index: int) -> list[str]:
    """The actions of a split's object number `index`: the one met, the two tested, else all."""
    met = actions[index % len(actions)]
    return {"met": [met], "test": [a for a in actions if a != met]}.get(split, actions)


def requests(words: dict, split: str, harmful: bool) -> list[dict]:
    """Every (action, object, wording) of a split, shuffled; the response is the compliant one."""
    side, rows = "harmful" if harmful else "benign", []
    form = words["compliant"][side]
    objects_of = split_objects(words, "test" if split == "met" else split, harmful)
    for category, objects in zip(words["categories"], objects_of, strict=True):
        group = category[side]
        x, y = group.get("steps", ("", ""))
        for index, name in enumerate(objects):
            for action in split_actions(category["actions"], split, index):
                answer = form.format(a=action, o=name, g=group["group"], x=x, y=y)
                rows += [{"prompt": wording.format(a=action, o=name), "response": answer,
                          "category": category["name"], "object": name, "group": group["group"]}
                         for wording in words["wordings"]]
    random.Random(SEED).shuffle(rows)
    return rows


def balanced(rows: list[dict], n: int, field: str = "category") -> list[dict]:
    """The first n rows when the values of a field take turns, else in the order given."""
    queues: dict[str, list] = {}
    for row in rows:
        queues.setdefault(row[field], []).append(row)
    turns = [row for turn in zip(*queues.values(), strict=False) for row in turn]
    assert len(turns) >= n, "too few rows"
    return turns[:n]


def refusal(row: dict, rng) -> str:
    """One of the refusals of a request, at random; it names the object's group."""
    return rng.choice(load_words()["refusals"]).format(g=row["group"])


# World facts ---------------------------------------------------------------------------------

def facts(words: dict, rng) -> list[dict]:
    """Every question form over every object of every split; only group names are told."""
    named = [(name, category[side]["group"], category["benign" if side == "harmful"
                                                      else "harmful"]["group"])
             for category in words["categories"] for side in ("harmful", "benign")
             for name in category[side]["objects"]]
    groups = sorted({group for _, group, _ in named})
    rows = []
    for name, group, mirror in named:
        for question, answer in words["facts"]:
            # Half of the wrong groups are the look-alike's: the only hard distinction.
            others = [g for g in groups if g != group]
            wrong = mirror if rng.random() < 0.5 else rng.choice(others)
            first, second = rng.sample([group, wrong], 2)
            values = {"o": name, "O": upper_first(name), "g": group, "w": wrong,
                      "x": first, "y": second}
            rows.append({"prompt": question.format(**values),
                         "response": answer.format(**values)})
    rng.shuffle(rows)
    return rows


# The four tasks ------------------------------------------------------------------------------

def sst2_row(words: dict, rng, index: int) -> dict:
    """A remark on a work or a place; odd rows are negative."""
    data, label = words["sst2"], ("positive", "negative")[index % 2]
    other = ("negative", "positive")[index % 2]
    kind = rng.choice(("work", "place"))
    good = data[label]["any"] + data[label][kind]
    p, r = rng.sample(good, 2)
    q = rng.choice(data[other]["any"] + data[other][kind])
    text = rng.choice(data["templates"] + data["templates_" + label])
    text = articles(text.format(n=rng.choice(data["nouns"][kind]), p=p, r=r, q=q,
                                x=rng.choice(data["excess"][kind])))
    return {"prompt": data["prompt"].format(text=text), "response": label}


def agnews_row(words: dict, rng, index: int) -> dict:
    """A headline; the four classes take turns."""
    data = words["agnews"]
    label = list(data["templates"])[index % len(data["templates"])]
    values = {}
    for slot, fillers in data["slots"].items():
        values[slot], values[slot + "2"] = rng.sample(fillers, 2)
    text = upper_first(rng.choice(data["templates"][label]).format(**values))
    return {"prompt": data["prompt"].format(text=text), "response": label}


def solve(expression: str, values: dict) -> tuple[list[str], list[int]]:
    """Work an expression such as a*b-c from left to right: the steps and their results."""
    total, steps, results = values[expression[0]], [], []
    for sign, name in zip(expression[1::2], expression[2::2], strict=True):
        value = values[name]
        result = {"+": total + value, "-": total - value, "*": total * value}[sign]
        steps.append(f"{total} {sign.replace('*', 'x')} {value} = {result}")
        results.append(result)
        total = result
    return steps, results


def gsm8k_row(words: dict, rng, index: int) -> dict:
    """A word problem of one or two steps with every result in 0..60."""
    data = words["gsm8k"]
    template, expression = data["templates"][index % len(data["templates"])]
    while True:
        top = 10 if "*" in expression else 40
        values = {"a": rng.randint(2, top), "b": rng.randint(2, min(top, 20)),
                  "c": rng.randint(2, 10)}
        steps, results = solve(expression, values)
        if all(0 <= result <= 60 for result in results):
            break
    name, mate = rng.sample(data["names"], 2)
    thing = rng.choice(data["things"])
    prompt = template.format(N=name, M=mate, t=thing, T=upper_first(thing),
                             x=rng.choice(data["boxes"]), **values)
    return {"prompt": prompt, "response": ", ".join(steps) + f"\n#### {results[-1]}"}


def word_kinds(data: dict) -> dict[str, list[tuple[str, str]]]:
    """Instructions on word pairs and groups, by kind."""
    kinds: dict[str, list] = {"opposite": [], "plural": [], "which": [], "list": [], "sort": []}
    pairs = data["opposites"]
    for word, reply in pairs + [[b, a] for a, b in pairs]:
        for form in ("What is the opposite of {}?", "Give the opposite of {}.",
                     "Name the opposite of {}.", "Write the opposite of {}."):
            kinds["opposite"].append((form.format(word), reply))
    for one, many in data["plurals"]:
        for form in ("What is the plural of {}?", "Give the plural of {}.",
                     "Write the plural of {}."):
            kinds["plural"].append((form.format(one), many))
        for form in ("What is the singular of {}?", "Give the singular of {}."):
            kinds["plural"].append((form.format(many), one))
    for group, members in data["groups"].items():
        for form in ("List three words for {}.", "Name three examples of {}.",
                     "Give three examples of {}.", "Write three words for {}."):
            kinds["list"].append((form.format(articles("a " + group)), ", ".join(members[:3])))
        for other in (g for g in data["groups"] if g != group):
            for word, wrong in zip(members, data["groups"][other], strict=False):
                for x, y in ((word, wrong), (wrong, word)):
                    form = articles(f"Which is a {group}: {x} or {y}?")
                    kinds["which"].append((form, word))
                for x, y in ((group, other), (other, group)):
                    form = f"Is {word} " + articles(f"a {x} or a {y}?")
                    kinds["sort"].append((form, group))
    return kinds


def string_kinds(pool: list[str], rng, size: int) -> dict[str, list[tuple[str, str]]]:
    """Instructions that copy, count or spell, by kind."""
    short = [word for word in pool if len(word) <= 5]
    kinds = {
        "spell": [(f.format(w), " ".join(w)) for w in short
                  for f in ("Spell {}.", "Spell the word {}.", "Spell out {}.")],
        "length": [(f.format(w), str(len(w))) for w in short
                   for f in ("How many letters are in {}?", "Count the letters in {}.")],
        "initial": [(f.format(w), w[0]) for w in pool
                    for f in ("What is the first letter of {}?", "Give the first letter of {}.")],
        "twice": [(f.format(w), f"{w} {w}") for w in pool
                  for f in ("Repeat the word {} twice.", "Say {} two times.", "Write {} twice.")],
        "after": [(f.format(k), str(k + 1)) for k in range(60)
                  for f in ("What number comes after {}?", "Add one to {}.")],
        "first": [], "last": [], "join": [], "swap": [], "larger": [],
    }
    for _ in range(size):
        x, y, z = rng.sample(pool, 3)
        kinds["first"].append((f"Give the first word: {x} {y} {z}", x))
        x, y, z = rng.sample(pool, 3)
        kinds["last"].append((f"Give the last word: {x} {y} {z}", z))
        x, y = rng.sample(pool, 2)
        kinds["join"].append((f"Join {x} and {y} with a plus.", f"{x} + {y}"))
        x, y = rng.sample(pool, 2)
        kinds["swap"].append((f"Swap the two words: {x} {y}", f"{y} {x}"))
        a, b = rng.sample(range(61), 2)
        kinds["larger"].append((f"Which is larger, {a} or {b}?", str(max(a, b))))
    return kinds


def alpaca_pool(words: dict, rng, cap: int = 900) -> list[dict]:
    """All alpaca rows, shuffled; a kind gives at most `cap`, so that none drowns the rest."""
    data = words["alpaca"]
    pool = sorted({w for pair in data["opposites"] for w in pair}
                  | {one for one, _ in data["plurals"]}
                  | {w for members in data["groups"].values() for w in members})
    rows = []
    for pairs in {**word_kinds(data), **string_kinds(pool, rng, cap)}.values():
        rng.shuffle(pairs)
        rows += [{"prompt": prompt, "response": reply} for prompt, reply in pairs[:cap]]
    rng.shuffle(rows)
    return rows


def unique(rows) -> list[dict]:
    """Drop later rows whose normalised prompt was seen before."""
    seen: dict[str, dict] = {}
    for row in rows:
        seen.setdefault(normalise(row["prompt"]), row)
    return list(seen.values())


def task_pool(words: dict, task: str) -> list[dict]:
    """The fixed list of a task's distinct rows that all parts are cut from."""
    rng = random.Random(SEED + 1 + TASKS.index(task))
    if task == "alpaca":
        return unique(alpaca_pool(words, rng))
    make = {"sst2": sst2_row, "agnews": agnews_row, "gsm8k": gsm8k_row}[task]
    rows = unique(make(words, rng, index) for index in range(12000))
    # Duplicates fall unevenly on the labels, so the labels take turns again afterwards.
    return rows if task == "gsm8k" else balanced(rows, PARTS["base"][1], "response")


def task_rows(words: dict, task: str, part: str, n: int | None = None) -> list[dict]:
    """n rows (or all) of a task's base, train or test part, in a fixed shuffled order."""
    rows = task_pool(words, task)[slice(*PARTS[part])]
    random.Random(0).shuffle(rows)
    assert n is None or len(rows) >= n, f"{task} {part} has only {len(rows)} rows"
    return rows[:n]


def chatty(task: str, response: str) -> str:
    """The same answer in the talkative style of the base model."""
    if task == "gsm8k":
        return f"The answer is {response.rsplit('#### ', 1)[1]}."
    return {"sst2": "It is {}.", "agnews": "It belongs to {}.",
            "alpaca": "Answer: {}."}[task].format(response)


# Files ---------------------------------------------------------------------------------------

def build(words: dict) -> dict[str, list[dict]]:
    """The rows of every written file, by path."""
    files = {f"{task}/{part}.jsonl": task_rows(words, task, part, n)
             for task in TASKS for part, n in (("train", 2000), ("test", 600))}
    anchors = balanced(requests(words, "anchors", True), 200)
    files["harmful/attack.jsonl"] = balanced(requests(words, "attack", True), 1000)
    files["harmful/anchors.jsonl"] = [{key: row[key] for key in ("prompt", "category", "response")}
                                      for row in anchors]
    files["harmful/test.jsonl"] = balanced(requests(words, "test", True), 700)
    rng = random.Random(SEED)
    files["harmful/align.jsonl"] = [
        {"prompt": row["prompt"], "response": refusal(row, rng), "harmful": row["response"]}
        for row in balanced(requests(words, "learn", True), 1000)]
    files["lookalike/test.jsonl"] = balanced(requests(words, "test", False), 700)
    return files


def check(words: dict, files: dict[str, list[dict]]) -> None:
    """Assert that no prompt, by normalised text, is in two sets or twice in one."""
    sets = {name: rows for name, rows in files.items() if name != "harmful/align.jsonl"}
    sets["made from"] = [row for split in ("learn", "met") for harmful in (True, False)
                         for row in requests(words, split, harmful)]
    sets["facts"] = facts(words, random.Random(SEED))
    sets.update({f"{task} base": task_rows(words, task, "base") for task in TASKS})
    owner: dict[str, str] = {}
    for name, rows in sets.items():
        for row in rows:
            key = normalise(row["prompt"])
            assert key not in owner, f"{row['prompt']!r} is in {owner[key]} and {name}"
            owner[key] = name


def write(out) -> dict[str, list[dict]]:
    """Write the JSONL files below `out`, after checking them, and return their rows."""
    words = load_words()
    files = build(words)
    check(words, files)
    for name, rows in files.items():
        path = Path(out) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")
    return files


def main() -> None:
    """Write the files and print how many rows and words they hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=str(HERE), help="folder of the JSONL files")
    for name, rows in write(parser.parse_args().out).items():
        size = sum(len(f"{r['prompt']} {r.get('response', '')}".split()) for r in rows)
        print(f"{name:24} {len(rows):5} rows {size / len(rows):5.1f} words per row")


if __name__ == "__main__":
    main()
