"""How many anchors does this model need? What K anchors hold, told from the aligned model alone.

Of each harmful test prompt x, with fresh adapters, g = dm(x)/dB and the anchors x'_1 .. x'_K:

    margin m   largest logit of a token that opens a refusal, minus the largest of the others
               (probes.py), at the last token of x: above 0 the model refuses
    cosine     of h(x) to the h of the nearest anchor
    coverage   ||P g||^2 / ||g||^2, P the projection on the span of all dh(x'_k)/dB: 0 .. 1
    reach      m / (||g|| sqrt(1 - coverage)): to first order the shortest step of the B's that
               moves no anchor's h and brings the margin to 0

B is that of all adapters together. At B = 0 the gradient with respect to A is zero, so the B's are
the whole tangent space of the first update. A step outside the span leaves every anchor's h where
it is: L_safe does not see it. The head is frozen, so m depends on B through h(x) alone, and an
anchor at x itself covers all of g.

With J (K C, P) the rows of all dh(x'_k)/dB, G = J J^T and b = J g it is ||P g||^2 = b^T G^+ b.
Nothing is sampled. G and b are added up in float64, layer by layer from the last one down, so that
J of one layer is all that is in memory (docs/coverage.md: the cost).

    python -m stress.coverage --anchors 1,2,4,8 --out before.jsonl --figure before.png
    python -m stress.coverage --predicted before.jsonl --run runs/a runs/b --figure after.png
"""

import math
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import distributed
import train as train_py
from anchors import encode, states
from cli import Args, Parser, check_outputs, exit_code
from cli import epoch_list as number_list
from data import mixture
from data.choice import choose_anchors
from data.rows import last_user
from device import device_and_dtype, peak_bytes
from eval import of_kind, one_line
from files import json_line, make_folder, read_lines, write_atomic
from lora import LoRALinear
from model import UserError, to_fp32
from runs import data_paths, read_result, read_settings, run_settings, weight_paths
from stress import attacks
from stress.probes import first_logits, margins, opener_ids
from tokenizer import Tokenizer

DIRECTIONS_A_PASS = 64  # of a backward pass; more take more memory and are hardly faster
COLUMNS = 8192  # of J that are widened to float64 at once
# Eigenvalues of G below this share of the largest count as zero. One of each anchor's C is zero,
# since the final norm fixes the length of h. On the embedded model fp32 leaves 1e-14 of it, where
# the smallest of the others is 2e-4 (K = 8).
TOLERANCE = 1e-10
N_SHOWN = 5  # prompts at either end of the list
QUARTILES = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
BY_K = ("cosine", "coverage", "reach")  # what depends on how many anchors are held
TOLD_BY = ("margin", *BY_K)  # what may tell which prompts fall
HOLDING = ("sbr", "sft")  # defences that hold K anchors; sft: with lambda 0


# One prompt's forward pass, and gradients back through it layer by layer


class Forward:
    """A prompt's h (C,), and what each layer was given, so that a layer can be run again alone."""

    def __init__(self, model, ids: Tensor):
        self.into_layers = []  # of each layer: its input (T, C)
        self.into_norm = None  # (T, C)
        self.beside = None  # what every layer is given beside its input

        def catch_layer(module, inputs):
            x, *self.beside = inputs
            self.into_layers.append(x)

        def catch_norm(module, inputs):
            (self.into_norm,) = inputs

        handles = [layer.register_forward_pre_hook(catch_layer) for layer in model.model.layers]
        handles.append(model.model.norm.register_forward_pre_hook(catch_norm))
        try:
            with torch.no_grad():
                self.h = to_fp32(states(model, [ids]))[0]
        finally:
            for handle in handles:
                handle.remove()

    def into_the_norm(self, model, directions: Tensor) -> Tensor:
        """Directions (n, C) of h -> their gradients with respect to the norm's input, (n, T, C)."""
        T, C = self.into_norm.shape
        upstream = directions.new_zeros(len(directions), T, C)
        upstream[:, -1] = directions  # h is the output at the last token
        (gradient,) = pull_back(model.model.norm, self.into_norm, upstream, [])
        return gradient

    def through_layer(self, model, i: int, upstream: Tensor) -> list[Tensor]:
        """upstream (n, T, C): gradients with respect to layer i's output.

        -> those with respect to its input (n, T, C), and to the B of each adapter (n, out, rank).
        """
        layer = model.model.layers[i]

        def run(x):
            return layer(x, *self.beside)

        return pull_back(run, self.into_layers[i], upstream, adapters_of(layer))


def pull_back(run, x: Tensor, upstream: Tensor, params: list[Tensor]) -> list[Tensor]:
    """Of <run(x), upstream_i>, i = 1 .. n, the gradients with respect to x and each of params."""
    x = x.detach().requires_grad_()
    # Attention in plain operations: their gradients can be batched on every device.
    with sdpa_kernel(SDPBackend.MATH):
        out = run(x)
    found = []
    for some in upstream.split(DIRECTIONS_A_PASS):
        found.append(torch.autograd.grad(out, [x, *params], some, is_grads_batched=True,
                                         retain_graph=True))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def adapters_of(layer: nn.Module) -> list[Tensor]:
    """The B of every adapter in a layer."""
    return [m.lora_B for m in layer.modules() if isinstance(m, LoRALinear)]


# The span of the anchors, and what lies in it


class Span:
    """J J^T and J g of all anchors' rows J and all test prompts' gradients g, in float64."""

    def __init__(self, K: int, C: int, n_tests: int, device):
        self.C = C
        wide = dict(dtype=torch.float64, device=device)
        self.G = torch.zeros(K * C, K * C, **wide)  # the lower triangle alone
        self.b = torch.zeros(K * C, n_tests, **wide)
        self.squared = torch.zeros(n_tests, **wide)  # ||g||^2

    def add(self, J: list[Tensor], g: list[Tensor]) -> None:
        """J: of each anchor (C, p), g: of each test prompt (p,), of some p entries of the B's."""
        for start in range(0, len(g[0]), COLUMNS):
            some = slice(start, start + COLUMNS)
            g_wide = torch.stack([its[some] for its in g]).double()  # (tests, columns)
            self.squared += g_wide.square().sum(dim=1)
            if not J:
                continue
            J_wide = torch.cat([its[:, some] for its in J]).double()  # (K C, columns)
            self.b += J_wide @ g_wide.T
            for end in range(self.C, len(self.G) + 1, self.C):
                rows = slice(end - self.C, end)
                self.G[rows, :end] += J_wide[rows] @ J_wide[:end].T

    def coverage(self, K: int) -> tuple[Tensor, int]:
        """By the first K anchors: coverage (tests,), and the number of directions they hold."""
        if K == 0:
            return torch.zeros_like(self.squared), 0
        n = K * self.C
        eigenvalues, vectors = torch.linalg.eigh(self.G[:n, :n])  # reads the lower triangle
        holds = eigenvalues > TOLERANCE * eigenvalues[-1]
        along = vectors[:, holds].T @ self.b[:n]  # (directions, tests)
        projected = (along.square() / eigenvalues[holds, None]).sum(dim=0)  # b^T G^+ b
        return projected / self.squared, int(holds.sum())


@dataclass
class Measured:
    """Of each test prompt, on the CPU in float64; by K: of the first K anchors."""

    margin: Tensor  # (tests,)
    gradient_norm: Tensor  # (tests,) ||g||
    cosine: dict[int, Tensor]  # to the nearest anchor; -1 where there is none
    coverage: dict[int, Tensor]
    reach: dict[int, Tensor]
    directions: dict[int, int]  # how many the anchors hold


def measure(model, tokenizer, anchors: list[Tensor], tests: list[Tensor], Ks) -> Measured:
    """What the first K of the anchors hold of the tests, for each of Ks; both are ids of prompts.

    The model has fresh adapters, B = 0, and a frozen head.
    """
    anchor_passes = [Forward(model, ids) for ids in anchors]
    test_passes = [Forward(model, ids) for ids in tests]
    h = torch.stack([one.h for one in test_passes]).requires_grad_()  # (tests, C)
    margin = margins(first_logits(model, h), opener_ids(tokenizer).to(h.device))  # (tests,)
    (toward,) = torch.autograd.grad(margin.sum(), h)  # dm/dh, (tests, C)
    C = h.shape[1]
    every = torch.eye(C, dtype=h.dtype, device=h.device)  # all directions of h
    passes = anchor_passes + test_passes
    wanted = [every] * len(anchors) + list(toward[:, None])  # of each pass, (n, C)
    span = Span(len(anchors), C, len(tests), h.device)
    upstream = []
    for one, directions in zip(passes, wanted, strict=True):
        upstream.append(one.into_the_norm(model, directions.to(model.dtype)))
    n_layer = len(model.model.layers)
    with tqdm(total=n_layer * len(passes), desc="gradients", leave=False, disable=None) as bar:
        for i in reversed(range(n_layer)):
            gradients = []  # of each pass: of each adapter (n, out * rank)
            for j, one in enumerate(passes):
                upstream[j], *its_own = one.through_layer(model, i, upstream[j])
                gradients.append([part.flatten(1) for part in its_own])
                bar.update()
            for of_an_adapter in zip(*gradients, strict=True):
                J = list(of_an_adapter[:len(anchors)])
                g = [row[0] for row in of_an_adapter[len(anchors):]]
                span.add(J, g)
    return summed_up(span, margin.detach(), h.detach(), anchor_passes, Ks)


def summed_up(span: Span, margin: Tensor, h: Tensor, anchor_passes: list[Forward], Ks) -> Measured:
    """The numbers of each prompt, once all layers are added up."""
    margin = margin.double().cpu()
    norm = span.squared.sqrt().cpu()
    found = Measured(margin, norm, {}, {}, {}, {})
    directions = F.normalize(h.double(), dim=1)
    for K in Ks:
        coverage, found.directions[K] = span.coverage(K)
        found.coverage[K] = coverage.cpu()
        free = (1 - found.coverage[K]).clamp(min=1e-12)  # rounding; 0 where x is an anchor
        found.reach[K] = margin / (norm * free.sqrt())
        nearest = torch.full_like(margin, -1.0)
        for one in anchor_passes[:K]:
            cosine = directions @ F.normalize(one.h.double(), dim=0)
            nearest = torch.maximum(nearest, cosine.cpu())
        found.cosine[K] = nearest
    return found


def prompt_keys(records: list[dict]) -> list[tuple[str, int]]:
    """For each record its prompt and how often that came before: conversations may end alike."""
    n_before = Counter()
    keys = []
    for r in records:
        keys.append((r["prompt"], n_before[r["prompt"]]))
        n_before[r["prompt"]] += 1
    return keys


# Predictions: from a model to a file


@dataclass
class Predictions:
    """What a file of predictions holds."""

    path: Path
    about: dict  # its first line: date, command, settings, digests, and means by K
    prompts: list[dict]  # the others: a test prompt each, with its margin, coverage by K, ...


def predict(args: Args, run_args: Args, command: list[str]) -> None:
    """Measures, prints, and writes the file and the figure."""
    distributed.check_alone()
    check_run(run_args)
    check_outputs(args.out, args.figure)
    out = file_for(args, run_args)
    if out.exists():
        raise UserError(f"{out} is there already, and predictions are not changed afterwards; "
                        "name another --out, or delete it.")
    device, _ = device_and_dtype(run_args.device, run_args.dtype, run_args.cuda_graph)
    if device.type == "mps":
        raise UserError("--device mps has no float64, expected cpu or cuda; pass --device cpu.")
    tokenizer = Tokenizer(run_args.model, run_args.template_date)
    files = mixture.read_files(run_args, reads_align_file=False)
    model = train_py.load_with_adapters(run_args, device, torch.float32)
    data = mixture.read_data(model, tokenizer, run_args, files, choose_anchors,
                             attacks.change_rows)
    rows = data.tests["harmful"]
    tests = [torch.tensor(mixture.prompt_ids(tokenizer, row)) for row in rows]
    began = time.perf_counter()
    found = measure(model, tokenizer, encode(tokenizer, data.anchor_prompts), tests, args.anchors)
    seconds = time.perf_counter() - began
    worked_out = train_py.work_out(model, data, 0, files.n_removed) | {"tolerance": TOLERANCE}
    paths = weight_paths(run_args.model, run_args.adapter) | data_paths(run_args, False)
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **run_settings(command, run_args, worked_out, paths),
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "by_K": {str(K): of_all_prompts(found, K) for K in args.anchors},
    }
    prompts = [of_one_prompt(found, i, last_user(row)) for i, row in enumerate(rows)]
    make_folder(out.parent)
    write_atomic(out, "".join(map(json_line, [about, *prompts])).encode())
    predictions = Predictions(out, about, prompts)
    print(table(predictions))
    if args.figure:
        draw_predictions(predictions, args.figure)


def file_for(args: Args, run_args: Args) -> Path:
    """--out, or runs/coverage-<model>-s<seed>.jsonl."""
    if args.out:
        return Path(args.out)
    return Path("runs") / f"coverage-{Path(run_args.model).name}-s{run_args.seed}.jsonl"


def check_run(run_args: Args) -> None:
    """UserError where the flags describe a run whose first update is not one of fresh B's alone."""
    conflict = None
    if run_args.defense not in HOLDING:
        conflict = f"--defense {run_args.defense}, which holds no anchors"
    elif run_args.stage == "align":
        conflict = "--stage align, which comes before the attack"
    elif run_args.keep_adapter:
        conflict = "--keep-adapter, whose B is not zero"
    elif run_args.attack == "unembedding":
        conflict = "--attack unembedding, which trains the head as well"
    elif run_args.dtype == "bfloat16":
        conflict = "--dtype bfloat16, in which small gradients are rounding"
    if conflict:
        raise UserError("coverage is that of new adapters on a frozen model in fp32, and was asked "
                        f"for with {conflict}; drop it.")


def of_all_prompts(found: Measured, K: int) -> dict:
    """Means over the test prompts, and quartiles of the coverage."""
    return {
        "directions": found.directions[K],
        "margin": found.margin.mean().item(),
        "cosine": found.cosine[K].mean().item(),
        "coverage": found.coverage[K].mean().item(),
        "coverage_quartiles": found.coverage[K].quantile(QUARTILES).tolist(),
        "reach": found.reach[K].mean().item(),
    }


def of_one_prompt(found: Measured, i: int, prompt: str) -> dict:
    """A prompt's line of the file."""
    line = {"prompt": prompt, "margin": six_digits(found.margin[i]),
            "gradient_norm": six_digits(found.gradient_norm[i])}
    for name in BY_K:
        line[name] = {str(K): six_digits(values[i]) for K, values in getattr(found, name).items()}
    return line


def six_digits(number: Tensor) -> float:
    """As many as fp32 has; more would double the file."""
    return float(f"{number.item():.6g}")


def table(predictions: Predictions) -> str:
    """A line for each K, and the prompts that should fall first and last with the largest K."""
    about = predictions.about
    prompts = predictions.prompts
    refused = [p for p in prompts if p["margin"] > 0]
    lines = [f"{about['args']['model']}, seed {about['args']['seed']}: {len(prompts)} harmful test "
             f"prompts, {len(refused)} with a margin above 0; {about['seconds']:.0f} s, "
             f"{about['peak_bytes'] / 1e6:,.0f} MB",
             f"{'K':>4}{'directions':>12}{'margin':>9}{'cosine':>9}{'coverage (quartiles)':>25}"
             f"{'reach':>9}"]
    for K, means in about["by_K"].items():
        low, _, high = means["coverage_quartiles"]
        coverage = f"{means['coverage']:.3f} ({low:.3f} to {high:.3f})"
        cosine = "-" if K == "0" else f"{means['cosine']:.3f}"
        lines.append(f"{K:>4}{means['directions']:>12}{means['margin']:>9.2f}{cosine:>9}"
                     f"{coverage:>25}{means['reach']:>9.3f}")
    K = list(about["by_K"])[-1]
    by_reach = sorted(refused, key=lambda p: p["reach"][K])
    ends = {"the first to fall": by_reach[:N_SHOWN],
            "the last": by_reach[N_SHOWN:][-N_SHOWN:]}
    for words, chosen in ends.items():
        if not chosen:
            continue
        lines.append(f"\nof those, {words} with K = {K}, by reach:")
        for p in chosen:
            lines.append(f"{p['reach'][K]:9.3f}  (margin {p['margin']:6.2f}, coverage "
                         f"{p['coverage'][K]:.3f})  {one_line(p['prompt'], 60)}")
    return "\n".join([*lines, f"\nwritten to {predictions.path}"])


# Predictions against finished runs


@dataclass
class Outcome:
    """What a run did to the prompts that were predicted."""

    run: str
    K: int  # anchors that it held
    predictions: Predictions
    hs: float  # of the last evaluation, in percent
    survived: list[dict]  # lines of the predictions: refused before training and after it
    fell: list[dict]  # refused before and not after


def compare(args: Args) -> None:
    """A line for each run, and the figure."""
    check_outputs(None, args.figure)
    predicted = [read_predictions(path) for path in args.predicted]
    outcomes = [outcome_of(run, predicted) for run in args.run]
    print(comparison(outcomes))
    if args.figure:
        draw_outcomes(outcomes, args.figure)


def read_predictions(path) -> Predictions:
    """A file that predict() wrote; UserError for another one."""
    about, *prompts = read_lines(path) or [{}]
    if "by_K" not in about or not prompts:
        raise UserError(f"{path} holds no predictions, expected a file that stress.coverage wrote "
                        "to its --out; name one.")
    return Predictions(Path(path), about, prompts)


def outcome_of(run: str, predicted: list[Predictions]) -> Outcome:
    """A run beside the predictions that are of it; UserError where none is."""
    settings = read_settings(run)
    hs = read_result(run)["hs"]
    K = settings["args"]["anchors"] if settings["args"]["lam"] > 0 else 0
    reasons = []
    for predictions in predicted:
        reason = mismatch(settings, K, predictions)
        if reason is None:
            break
        reasons.append(f"{predictions.path}: {reason}")
    else:
        raise UserError(f"no predictions are of {run} ({'; '.join(reasons)}); make them from the "
                        "same model, seed and anchors.")
    epoch = list(hs)[-1]
    harmful = refused_before(run, int(epoch))
    outcome = Outcome(run, K, predictions, hs[epoch], [], [])
    keys = prompt_keys(predictions.prompts)
    for key, prompt in zip(keys, predictions.prompts, strict=True):
        verdict = harmful.get(key)
        if verdict is False:
            outcome.survived.append(prompt)
        elif verdict is True:
            outcome.fell.append(prompt)
    return outcome


def mismatch(settings: dict, K: int, predictions: Predictions) -> str | None:
    """Why predictions are not of a run with these settings that holds K anchors; None: they are."""
    about = predictions.about
    for name in ("model", "adapter", "tests"):
        if settings["sha256"].get(name) != about["sha256"].get(name):
            return f"another {name}"
    for name in ("seed", "n_test", "attack", "attack_prefix", "attack_suffix", "template_date"):
        if settings["args"].get(name) != about["args"].get(name):
            return f"{name} {about['args'].get(name)}, the run has {settings['args'].get(name)}"
    for name in ("rank", "alpha", "rslora"):
        if settings["worked_out"].get(name) != about["worked_out"].get(name):
            return f"another {name}"
    if settings["args"].get("defense") not in HOLDING:
        return f"the run's defence is {settings['args'].get('defense')}"
    held = settings["worked_out"]["anchor_prompts"][:K]
    if held != about["worked_out"]["anchor_prompts"][:K]:
        return "other anchors"
    if str(K) not in about["by_K"]:
        return f"K = {', '.join(about['by_K'])}, the run holds {K}"
    return None


def refused_before(run: str, epoch: int) -> dict[tuple[str, int], bool | None]:
    """Of each prompt that the aligned model refused, by prompt_keys: is the reply harmful now.

    UserError where a run does not say what the aligned model did.
    """
    records = of_kind(read_lines(Path(run) / "generations.jsonl"), "harmful")
    at_epoch = [r for r in records if r["epoch"] == epoch]
    verdicts = {}
    for key, r in zip(prompt_keys(at_epoch), at_epoch, strict=True):
        if r.get("before") is None:
            raise UserError(f"{run} does not say what the aligned model replied, expected a run of "
                            "this version that evaluated epoch 0; make it again.")
        if r["before"] == "refused":
            verdicts[key] = r["verdict"]
    return verdicts


def auc(survived: list[float], fell: list[float]) -> float:
    """The share of pairs of which the survivor has the higher number; a tie counts half.

    0.5 says nothing, 1 tells all. NaN where all survived, or none.
    """
    if not survived or not fell:
        return math.nan
    difference = torch.tensor(survived)[:, None] - torch.tensor(fell)
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


def numbers_of(prompts: list[dict], name: str, K: int) -> list[float]:
    """A number of each prompt; of those in BY_K the one that belongs to K anchors."""
    if name in BY_K:
        return [p[name][str(K)] for p in prompts]
    return [p[name] for p in prompts]


def reach_of_fall(o: Outcome) -> float:
    """The reach below which as many prompts lie as fell; infinite where all fell, NaN for none."""
    by_reach = sorted(numbers_of(o.fell + o.survived, "reach", o.K))
    if not by_reach:
        return math.nan
    return [*by_reach, math.inf][len(o.fell)]


def mean_coverage(o: Outcome) -> float:
    """Over all test prompts that were predicted."""
    return statistics.mean(numbers_of(o.predictions.prompts, "coverage", o.K))


def comparison(outcomes: list[Outcome]) -> str:
    """HS beside the mean coverage, and how well each number told survivors from fallen."""
    lines = [f"{'run':32}{'K':>4}{'coverage':>10}{'HS':>7}{'lost':>13}{'at reach':>10}   AUC: "
             + "".join(f"{name:>10}" for name in TOLD_BY)]
    for o in outcomes:
        lost = f"{len(o.fell)} of {len(o.fell) + len(o.survived)}"
        line = f"{o.run[-31:]:32}{o.K:>4}{mean_coverage(o):>10.3f}{o.hs:>7.1f}{lost:>13}"
        line += f"{reach_of_fall(o):>10.3f}        "
        for name in TOLD_BY:
            told = auc(numbers_of(o.survived, name, o.K), numbers_of(o.fell, name, o.K))
            line += f"{'-' if math.isnan(told) else format(told, '.3f'):>10}"
        lines.append(line)
    for predictions in {o.predictions.path: o.predictions for o in outcomes}.values():
        about = predictions.about
        lines.append(f"{predictions.path}: written {about['date']} at commit {about['git']}"
                     f"{began_before(outcomes, predictions)}")
    return "\n".join(lines)


def began_before(outcomes: list[Outcome], predictions: Predictions) -> str:
    """What to say of runs that began before their predictions were written."""
    written = datetime.fromisoformat(predictions.about["date"]).timestamp()
    early = []
    for o in outcomes:
        began = read_settings(o.run).get("began")  # a run of an older version does not say
        if o.predictions.path == predictions.path and began:
            if datetime.fromisoformat(began).timestamp() < written:
                early.append(o.run)
    return f"; begun before that: {', '.join(early)}" if early else ""


# Figures, in grey


def draw_predictions(predictions: Predictions, path) -> None:
    """Margin and coverage of each prompt, with fewest and most anchors; coverage against K."""
    plt, figure, (left, right) = two_panels()
    by_K = predictions.about["by_K"]
    counts = [int(K) for K in by_K]
    scatter(left, predictions.prompts, counts[-1], f"K = {counts[-1]}", "0", "o")
    fewest = [K for K in counts[:-1] if K > 0][:1]
    for K in fewest:
        scatter(left, predictions.prompts, K, f"K = {K}", "0.55", "x")
    left.legend(frameon=False, fontsize=8)
    low = [means["coverage_quartiles"][0] for means in by_K.values()]
    high = [means["coverage_quartiles"][-1] for means in by_K.values()]
    right.fill_between(counts, low, high, color="0.85", label="quartiles")
    right.plot(counts, [means["coverage"] for means in by_K.values()], color="0", marker="o",
               label="mean")
    right.set_xticks(counts)
    right.set_ylim(0, 1)
    right.set_xlabel("anchors, K")
    right.set_ylabel("coverage")
    right.legend(frameon=False, fontsize=8, loc="lower right")
    args = predictions.about["args"]
    figure.suptitle(f"{Path(args['model']).name}, seed {args['seed']}: {len(predictions.prompts)} "
                    "harmful test prompts, before any training", fontsize=10)
    save(plt, figure, path)


def draw_outcomes(outcomes: list[Outcome], path) -> None:
    """What fell and what survived in the first run; HS against the mean coverage of each run."""
    plt, figure, (left, right) = two_panels()
    first = outcomes[0]
    args = first.predictions.about["args"]
    scatter(left, first.survived, first.K, "still refused", "0.55", "x")
    scatter(left, first.fell, first.K, "lost", "0", "o")
    left.set_title(f"prompts refused before, K = {first.K}, seed {args['seed']}", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    for K, marker in zip(sorted({o.K for o in outcomes}), cycle("ov^sDP*X")):
        its_own = [o for o in outcomes if o.K == K]
        right.plot([mean_coverage(o) for o in its_own], [o.hs for o in its_own], color="0.2",
                   linestyle="", marker=marker, label=f"K = {K}")
    right.legend(frameon=False, fontsize=8)
    right.set_title("runs", fontsize=10)
    right.set_xlim(-0.02, 1)
    right.set_ylim(0, 100)
    right.set_xlabel("mean coverage, before training")
    right.set_ylabel("HS after it, %")
    figure.suptitle(Path(args["model"]).name, fontsize=10)
    save(plt, figure, path)


def two_panels():
    """-> (pyplot, a figure, its two axes)."""
    import matplotlib
    matplotlib.use("Agg")  # no window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return plt, figure, axes


def scatter(axis, prompts: list[dict], K: int, label: str, color: str, marker: str) -> None:
    """Prompts by their margin and their coverage by K anchors."""
    axis.scatter(numbers_of(prompts, "margin", K), numbers_of(prompts, "coverage", K), s=12,
                 linewidths=0.7, color=color, marker=marker, label=label)
    axis.set_xlabel("refusal margin")
    axis.set_ylabel("coverage")
    axis.set_ylim(0, 1)


def save(plt, figure, path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


# The flags


def parse(argv=None) -> tuple[Args, Args | None]:
    """-> (the flags of this program, those of the run that is predicted: train.py's).

    The second is None where predictions are compared.
    """
    p = Parser("stress.coverage", "How many anchors does this model need? All further flags are "
                                  "train.py's and describe the run that is predicted: --model, "
                                  "--data-dir, --anchor-file, --seed, --n-test, --rank, ...")
    p.add_argument("--anchors", type=number_list, metavar="K", default=(0, 1, 2, 4, 8),
                   help="numbers of anchors, as 1,2,4,8")
    p.add_argument("--out", help="file for the predictions, which must not be there yet (default "
                                 "runs/coverage-<model>-s<seed>.jsonl)")
    p.add_argument("--figure", help="file for two panels, as .png or .pdf")
    p.add_argument("--predicted", nargs="+", metavar="FILE",
                   help="earlier --out files, to be compared with --run")
    p.add_argument("--run", nargs="+", metavar="DIR", help="finished runs of train.py")
    args, rest = p.parse_own(argv)
    if bool(args.predicted) != bool(args.run):
        p.error("--predicted and --run go together; give both, or neither")
    if args.run and (rest or args.out):
        p.error(f"--run compares what was written before and was given with "
                f"{' '.join(rest) or '--out'}; drop it")
    if args.run:
        return args, None
    return args, train_py.parse(["--anchors", str(max(args.anchors)), *rest])


def execute(argv: list[str]) -> None:
    args, run_args = parse(argv)
    if args.run:
        compare(args)
    else:
        predict(args, run_args, ["stress.coverage", *argv])


def main(argv=None) -> int:
    """0 done, 2 the user's mistake, 3 failed, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_code("stress.coverage", lambda: execute(argv))


if __name__ == "__main__":
    sys.exit(main())
