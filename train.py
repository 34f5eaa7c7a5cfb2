"""Fine-tune an aligned model on an upload that may hold harmful rows, with or without a defence.

    python train.py --anchors 1 --lambda 50                     # the embedded model, SBR
    python train.py --defense sft                               # the same attack, undefended
    python train.py --model DIR --data FILE.jsonl --anchor-file A.txt --harmful-file T.txt

Per update, over a batch of rows (the user's) and K anchors (the service's):

    L_total = L_CE + lambda * L_safe
    L_CE    = mean negative log likelihood of the supervised tokens of the whole batch
    L_safe  = distance of h at the anchors from the aligned model's h_ref       see anchors.py

AdamW and the learning rate that falls linearly to zero are in the paper ("Loss & Training"). The
zero weight decay is in its code (HFT_SBR.py:165-178 of soyoaaa/SBR at 188990b). Clipping the
gradient at 1 is the default of the Trainer that its code uses.
"""

import hashlib
import json
import signal
import sys

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import distributed
from anchors import Anchors, FinalNorm
from baselines import RIVALS
from baselines.common import Defence, Published
from cli import (
    COUNT,
    POSITIVE,
    SEED,
    Args,
    Parser,
    RunFailed,
    at_least,
    epoch_list,
    exit_code,
    memory_for,
)
from data import choice, mixture
from data.batches import batch_at, updates_per_epoch
from data.tasks import check_rule
from device import add_device_flags, device_and_dtype
from eval import (
    DEFAULTS,
    add_eval_flags,
    evaluate,
    evaluation_line,
    replies_at_epoch_0,
    report,
    unjudged_at_the_end,
)
from generate import load_aligned
from judges import open_judge
from lora import adapted, add_lora, load_adapter, trainable
from model import UserError, to_fp32
from runs import Log, Progress, Run, choose_dir, data_paths, open_run, run_settings, weight_paths
from stress import attacks
from stress.probes import make_probe
from tokenizer import Tokenizer

# The defence


def make_sbr_step(model, tokenizer, args, data):
    """L_total = L_CE + lambda * L_safe; h is the final RMSNorm's output: all the head sees."""
    # Phase 1, before the first update: h_ref (K, C).
    anchors = Anchors(model, tokenizer, data.anchor_prompts, args.reduction, args.max_len)

    def step(batch):
        ce = torch.zeros((), device=batch.device)
        safe = torch.zeros((), device=batch.device)
        for pack in batch.packs(anchors.ids):  # cut by token budget; the anchors in the first
            with FinalNorm(model) as norm:  # catches h of every row, (N, C), as it passes
                logits = model(pack.ids, pack.seqlens, path=pack.path,
                               rows=pack.supervised)  # (R, V)
            ce_sum = F.cross_entropy(to_fp32(logits), pack.targets, reduction="sum")
            loss = ce_sum / batch.n_supervised  # the whole batch's count: no cut changes it
            if pack.anchor_rows is not None:
                h = norm.value[pack.anchor_rows]  # (K, C), the bottleneck at the anchors
                l_safe = anchors.loss(h)  # against h_ref
                loss = loss + args.lam * l_safe  # L_total = L_CE + lambda * L_safe
                safe = l_safe.detach()
            loss.backward()
            ce = ce + ce_sum.detach() / batch.n_supervised
        ce, safe = distributed.add_up(model, ce, safe)  # where several processes share the batch
        # Tensors on the device: reading their values here would make the CPU wait.
        return {"loss": ce + args.lam * safe, "ce": ce, "safe": safe}

    return step


SBR = Defence(
    name="sbr",
    make_step=make_sbr_step,
    watches="bottleneck_anchors",
    # On the embedded model, where C is 96, the paper's formula (--reduction sum) with its lambda 50
    # is lambda 4800 here; its code, which adds L_safe four times an update, is lambda 200.
    search=(
        "--lambda 0.005",
        "--lambda 0.05",
        "--lambda 0.5",
        "--lambda 5",
        "--lambda 50",
        "--lambda 500",
        "--lambda 5000",
        "--lambda 50000",
    ),
    published=Published(
        setting="--lambda 50",
        source="arXiv 2605.05995 and soyoaaa/SBR at 188990b, HFT_SBR.py: lambda 50, K = 8"))
# Plain fine-tuning is SBR's step with lambda 0, so it logs L_safe too, which nothing then holds.
SFT = Defence(
    name="sft",
    make_step=make_sbr_step,
    stages=("finetune", "align"))
DEFENSES = {defence.name: defence for defence in [SBR, SFT, *RIVALS]}


# The loop


LOGGED_BY_THE_LOOP = ("step", "batch", "tokens", "computed", "grad_norm", "lr")


def check_numbers(numbers: dict) -> None:
    """The contract of baselines/common.py: what a step must return, and what it may not."""
    missing = {"loss", "ce"} - numbers.keys()
    assert not missing, f"the step returned no {missing}"
    reserved = numbers.keys() & set(LOGGED_BY_THE_LOOP)
    assert not reserved, f"the loop itself logs {reserved}; the step needs other names"


def updates(step_fn, batch_of, optimizer, *, lr, grad_clip, n_updates, start=0):
    """The one training loop: yields (step, numbers to log) after each update.

    step_fn(batch) is a defence's step (baselines/common.py), batch_of(step) gives the batch.
    """
    params = []
    for group in optimizer.param_groups:
        params += group["params"]
    for step in range(start, n_updates):
        batch = batch_of(step)
        lr_now = lr * (1 - step / n_updates)  # falls linearly to zero
        for group in optimizer.param_groups:
            group["lr"] = lr_now
        numbers = step_fn(batch)  # leaves the gradient in .grad
        check_numbers(numbers)
        grad_norm = clip_grad_norm_(params, grad_clip)  # the norm before clipping
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        n_computed = distributed.count(batch.n_computed)
        yield step, {"batch": batch.name, "tokens": batch.n_tokens, "computed": n_computed,
                     **numbers, "grad_norm": grad_norm, "lr": lr_now}


def train(run: Run, model, data, step_fn, optimizer, probe, evaluate_now, ask_aligned_model,
          args) -> Progress:
    """All updates, from where the run's folder stands, with log, evaluations and checkpoints.

    evaluate_now(epoch, progress) may fail: a judge is down, the disk is full. So the checkpoint,
    and in the end the adapter, are written before it, and a resumed run begins with the evaluation
    that is missing. ask_aligned_model() is called before the first update where epoch 0 is not
    evaluated, since later evaluations compare with what the model did then.
    """
    per_epoch = updates_per_epoch(len(data.examples), args.batch_size)
    n_updates = per_epoch * args.epochs
    start, progress = run.start(model, optimizer, step_fn)
    # Reading a number makes the CPU wait for the GPU, so there 20 updates are read together: our
    # choice, not yet measured.
    log = Log(run, progress, every=1 if model.device.type == "cpu" else 20)
    stop = StopRequest()

    def batch_of(step):
        return batch_at(data.examples, step, args.batch_size, args.seed, args.tokens_per_pass,
                        model.device, distributed.part())

    def probe_if_due(epoch):
        if epoch in args.probes and str(epoch) not in progress.probes:
            progress.probes[str(epoch)] = probe()

    def evaluate_if_due(epoch, step):
        if epoch not in args.eval_epochs or str(epoch) in progress.evals:
            return
        evaluate_now(epoch, progress)
        run.save(model, optimizer, step_fn, step, progress)
        if distributed.any_of(stop.requested):
            raise KeyboardInterrupt

    if start == 0 and 0 not in args.eval_epochs and "0" not in progress.evals:
        ask_aligned_model()
    # The evaluation of epoch 0, or one at which the run was stopped.
    if start % per_epoch == 0:
        probe_if_due(start // per_epoch)
        evaluate_if_due(start // per_epoch, start)
    log.restart_clock()
    all_updates = updates(step_fn, batch_of, optimizer, lr=args.lr, grad_clip=args.grad_clip,
                          n_updates=n_updates, start=start)
    for step, numbers in tqdm(all_updates, total=n_updates, initial=start, desc="training",
                              unit="update", disable=distributed.hides_bars()):
        log.add(step, numbers)
        stops = distributed.any_of(stop.requested)
        epochs_done = (step + 1) // per_epoch
        epoch_ends = (step + 1) % per_epoch == 0
        evaluation_follows = epoch_ends and epochs_done in args.eval_epochs
        checkpoint_is_due = epoch_ends and epochs_done % args.save_every == 0
        if epoch_ends:
            log.flush()
            tqdm.write(epoch_line(epochs_done, progress))
            probe_if_due(epochs_done)
        if checkpoint_is_due or evaluation_follows or stops:
            log.flush()
            distributed.check_alike(model)
            if step + 1 == n_updates:
                run.save_adapter(model)
            run.save(model, optimizer, step_fn, step + 1, progress)
            # Here alone, so that no run stops without its checkpoint; asked again, since the signal
            # may have come while that was written.
            if distributed.any_of(stop.requested):
                raise KeyboardInterrupt
        if epoch_ends:
            evaluate_if_due(epochs_done, step + 1)
            log.restart_clock()  # what an epoch ends with is not training
    return progress


def epoch_line(epoch: int, progress: Progress) -> str:
    """One line per epoch: its last update's numbers, and the run's mean speed."""
    numbers = [f"{name} {value:.4g}" for name, value in progress.last.items()
               if name not in ("step", "batch", "tokens", "computed")]
    speed = progress.tokens / progress.seconds
    return f"epoch {epoch:3}  {'  '.join(numbers)}  {speed:,.0f} tokens/s"


class StopRequest:
    """The first Ctrl-C (or SIGTERM) asks for a checkpoint after the update; the second stops."""

    def __init__(self):
        self.requested = False
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_number, self._receive)

    def _receive(self, *_):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


# The flags


RANK = 16  # the paper's r
ALPHA = 16.0  # the paper's alpha


def parse(argv=None) -> Args:
    """The flags, with defaults filled in and checked against each other."""
    p = Parser("train.py", "Fine-tune an aligned model on an upload that may hold harmful rows, "
                           "with or without a defence.")
    mixture.add_flags(p.add_argument_group("model and data"))
    add_defence_flags(p.add_argument_group("defence"))
    attacks.add_flags(p.add_argument_group("attack"))
    for rival in RIVALS:
        if rival.add_flags:
            rival.add_flags(p.add_argument_group(f"--defense {rival.name}"))
    add_optimiser_flags(p.add_argument_group("optimisation (defaults: the paper's)"))
    add_output_flags(p.add_argument_group("evaluation and output"))
    args = fill_defaults(p.parse_args(argv))
    check_flags(args)
    return args


def add_defence_flags(group) -> None:
    group.add_argument("--defense", choices=DEFENSES, default="sbr", help="sft is lambda 0")
    group.add_argument("--stage", choices=("finetune", "align"),
                       help="on the upload, or before it on --align-file (default: the defence's "
                            "own)")
    group.add_argument("--anchors", type=at_least(int, 0), default=8, metavar="K",
                       help="harmful prompts held; 0 is plain fine-tuning")
    group.add_argument("--lambda", dest="lam", type=at_least(float, 0), default=50.0, metavar="L",
                       help="weight of L_safe; with any other defence than sbr it is 0")
    group.add_argument("--reduction", choices=("mean", "sum"), default="mean",
                       help="over the C numbers of h: mean as the paper's code, sum as its formula")
    group.add_argument("--anchor-file",
                       help="own anchor pool: one prompt per line, or JSONL, JSON, CSV")
    choice.add_flags(group)


def add_optimiser_flags(group) -> None:
    group.add_argument("--rank", type=COUNT, default=RANK, help="rank of the adapters")
    group.add_argument("--alpha", type=POSITIVE, default=ALPHA,
                       help="they are scaled by alpha / rank")
    group.add_argument("--rslora", action="store_true", help="by alpha / sqrt(rank) instead")
    group.add_argument("--lr", type=POSITIVE, default=1e-5, help="falls linearly to 0")
    group.add_argument("--epochs", type=COUNT, default=20, help="passes over the upload")
    group.add_argument("--batch-size", type=COUNT, default=32, help="rows per update")
    group.add_argument("--beta1", type=at_least(float, 0, at_most=0.9999), default=0.9,
                       help="of AdamW")
    group.add_argument("--grad-clip", type=POSITIVE, default=1.0, help="largest gradient norm")
    group.add_argument("--tokens-per-pass", type=COUNT, default=16384,
                       help="a larger batch is cut: less memory, the same gradient")
    group.add_argument("--seed", type=SEED, default=0,
                       help="draws adapters, order of rows and, without --anchor-seed, anchors")
    group.add_argument("--shard", action="store_true",
                       help="under torchrun: spread a base that fits no single GPU over all")
    group.add_argument("--recompute", action="store_true",
                       help="run each block again in backward: less memory, the same gradient, "
                            "slower")
    add_device_flags(group)


def add_output_flags(group) -> None:
    group.add_argument("--eval-epochs", type=epoch_list, help="as 0,5,20 (default: 0 and the last)")
    group.add_argument("--probes", type=epoch_list, default=(),
                       help="when stress/probes.py measures")
    group.add_argument("--n-test", type=COUNT, default=500, help="test prompts of a kind at most")
    add_eval_flags(group)
    group.set_defaults(**DEFAULTS)
    group.add_argument("--out", help="folder (default runs/<task>-<defense>-K<k>-lam<l>-s<seed>)")
    group.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    group.add_argument("--save-every", type=COUNT, default=1, help="epochs between checkpoints")


def fill_defaults(args: Args) -> Args:
    """Fills in the defaults that depend on other flags.

    Where lambda and poison do not apply, they become 0.
    """
    stage = args.stage
    if stage is None:
        stage = DEFENSES[args.defense].stages[0]
    task = args.task
    if task is None and not args.data:
        task = "sst2"
    eval_epochs = args.eval_epochs
    if eval_epochs is None:
        eval_epochs = (0, args.epochs)
    makes_a_mixture = not args.data and stage == "finetune"
    return args.replace(
        stage=stage,
        task=task,
        poison=args.poison if makes_a_mixture else 0.0,
        lam=args.lam if args.defense == "sbr" else 0.0,
        anchor_seed=args.seed if args.anchor_seed is None else args.anchor_seed,
        eval_epochs=eval_epochs)


def check_flags(args: Args) -> None:
    """UserError where two flags do not go together."""
    stages = DEFENSES[args.defense].stages
    if args.stage not in stages:
        raise UserError(f"--defense {args.defense} lacks stage {args.stage}, expected {stages[0]}; "
                        "change one of the two.")
    if args.data and args.stage == "align":
        raise UserError("--data was given for the stage align, which reads --align-file; drop one.")
    if args.keep_adapter and not args.adapter:
        raise UserError("--keep-adapter was given without --adapter; name the adapter to train on.")
    has_own_adapter = (args.rank, args.alpha, args.rslora) != (RANK, ALPHA, False)
    if args.attack == "subspace" and has_own_adapter:
        raise UserError("--rank, --alpha or --rslora was given with --attack subspace, whose rank "
                        "is 1 and whose scale is 1; drop it.")
    if max(args.eval_epochs + args.probes) > args.epochs:
        raise UserError(f"--eval-epochs or --probes is above --epochs {args.epochs}; lower it.")
    if args.shard:
        check_shard(args)
    attacks.check(args)
    check_rule(args.task, args.fa_rule)


def check_shard(args: Args) -> None:
    """UserError where --shard is given for what a spread base cannot do."""
    _, n_processes = distributed.started()
    if n_processes == 1:
        raise UserError("--shard spreads the model over several processes, and there is one; start "
                        "train.py by torchrun, or drop the flag.")
    conflict = find_shard_conflict(args)
    if conflict:
        raise UserError(f"--shard was given with {conflict}.")


def find_shard_conflict(args: Args) -> str | None:
    """What a spread base does not go with, and what to do; None where all is well."""
    if args.adapter and not args.keep_adapter:
        return "--adapter without --keep-adapter, which merges whole weights; run merge.py first"
    if args.attack == "unembedding":
        return "--attack unembedding, which trains the whole head; drop one"
    if args.defense == "deepalign":
        return "--defense deepalign, whose reference takes passes of its own; drop one"
    if args.probes:
        return "--probes, which read whole weights; drop one"
    if args.cuda_graph:
        return "--cuda-graph, which cannot hold messages between processes; drop one"
    return None


# The program


def load_with_adapters(args, device, dtype):
    """The aligned model with what is trained on it; new adapters have B = 0 and change no answer.

    UserError where --max-len is more than the model was trained for.
    """
    if args.shard:
        model = load_sharded(args, device, dtype)
    else:
        model = load_aligned(args.model, device, dtype, args.adapter, args.keep_adapter)
        add_trainable(model, args)
    if args.max_len > model.config.max_positions:
        raise UserError(f"--max-len {args.max_len} is above the {model.config.max_positions} "
                        "positions that the model was trained for; lower it.")
    model.model.recompute = args.recompute
    return model


def load_sharded(args, device, dtype):
    """The same with a base that is spread over the processes."""
    def add_adapters(model) -> None:
        if args.keep_adapter:
            load_adapter(model, args.adapter)
        add_trainable(model, args)

    return distributed.load_sharded(args.model, device, dtype, add_adapters)


def add_trainable(model, args) -> None:
    """Puts on the model what is trained: adapters, and what an attack trains beside or instead."""
    has_kept_adapters = len(adapted(model)) > 0
    if not has_kept_adapters and args.attack != "subspace":
        add_lora(model, args.rank, args.alpha, args.rslora, seed=args.seed)
    attacks.attach(model, args.attack, args.seed)


def digest_of_rows(data) -> str:
    """One digest over all that is trained on: the tokenised rows, and the defender's own.

    It is the digest of [rows, own] in JSON, which is written row by row, since the whole would take
    several times the memory of the ids.
    """
    digest = hashlib.sha256(b"[[")
    for i, e in enumerate(data.examples):
        if i > 0:
            digest.update(b", ")
        digest.update(json.dumps([e.ids.tolist(), e.predict.tolist()]).encode())
    own = [[row["messages"], row["harmful"]] for row in data.align or []]
    digest.update(b"], " + json.dumps(own).encode() + b"]")
    return digest.hexdigest()


def work_out(model, data, n_updates: int, n_removed: dict[str, int]) -> dict:
    """What follows from flags and files together, for config.json.

    n_removed: by kind, the tests that are left out, since they stand in the upload.
    """
    adapters = [adapter for _, adapter in adapted(model)]
    return {
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "rank": shared(adapter.rank for adapter in adapters),  # of --adapter's, if that is kept
        "alpha": shared(adapter.alpha for adapter in adapters),
        "rslora": shared(adapter.rslora for adapter in adapters),
        "sequences": len(data.examples),  # a row, or one for each of its answers
        "rows_sha256": digest_of_rows(data),
        "updates": n_updates,
        "processes": distributed.size(),
        "anchor_prompts": data.anchor_prompts,
        "anchors_passed_over": data.passed_over,
        "tests_removed": n_removed,
    }


def shared(values):
    """The value that all have; where they differ, each one that occurs, in a list from low up."""
    distinct = sorted(set(values))
    if len(distinct) == 1:
        return distinct[0]
    return distinct


MEMORY_ADVICE = ("what was saved is kept, and --resume goes on from there, for example with a "
                 "smaller --max-new or without long test prompts")


def fine_tune(run: Run, model, tokenizer, data, args) -> None:
    """One whole run in its folder, from the defence's preparations to result.json."""
    step_fn = DEFENSES[args.defense].make_step(model, tokenizer, args, data)
    # The loop sets the learning rate of each update.
    optimizer = torch.optim.AdamW(trainable(model), lr=args.lr, betas=(args.beta1, 0.999),
                                  weight_decay=0.0, fused=True)
    # Of several processes the first one judges, and only it needs a judge.
    judge = open_judge(args, run.dir) if distributed.is_first() else None
    probe = None
    if args.probes:
        probe = make_probe(model, tokenizer, data, optimizer, args.max_len, args.tokens_per_pass)

    def evaluate_now(epoch: int, progress: Progress) -> None:
        # What the aligned model said; at epoch 0 this is the aligned model.
        aligned = None
        if epoch > 0:
            aligned = distributed.by_the_first(lambda: replies_at_epoch_0(run.dir))
        with memory_for(f"the evaluation at epoch {epoch}", MEMORY_ADVICE):
            numbers, records = evaluate(model, tokenizer, data.tests, judge, args, epoch,
                                        aligned=aligned, is_aligned=epoch == 0)
        # A resumed run may ask other tests than the run that it continues.
        numbers["tests_sha256"] = run.settings["sha256"]["tests"]
        run.append("generations", records)
        progress.evals[str(epoch)] = numbers
        tqdm.write(evaluation_line(epoch, numbers))

    def ask_aligned_model() -> None:
        """The harmful prompts alone: lines of epoch 0 in generations.jsonl, and no numbers."""
        harmful = {"harmful": data.tests["harmful"]}
        with memory_for("asking the aligned model", MEMORY_ADVICE):
            _, records = evaluate(model, tokenizer, harmful, judge, args, epoch=0, is_aligned=True)
        run.append("generations", records)

    print(opening(run, model, data.summary))
    progress = train(run, model, data, step_fn, optimizer, probe, evaluate_now, ask_aligned_model,
                     args)
    run.finish(model, progress)


def opening(run: Run, model, summary: str) -> str:
    """What a run says before it begins; summary: of its data."""
    n_trained = sum(p.numel() for p in trainable(model))
    n_base = sum(p.numel() for p in model.parameters()) - n_trained
    worked_out = run.settings["worked_out"]
    return (f"{run.settings['args']['model']}: {n_base:,} parameters, frozen, "
            f"{worked_out['dtype']} on {worked_out['device']}; {n_trained:,} in adapters, trained\n"
            f"{summary}\n"
            f"commit {str(run.settings['git'])[:7]}, torch {torch.__version__}; all settings, "
            f"versions and digests: {run.dir / 'config.json'}")


def execute(args: Args, command: list[str]) -> None:
    """Reads everything, then opens the folder, so that a mistake leaves nothing behind."""
    device, dtype = device_and_dtype(args.device, args.dtype, args.cuda_graph)
    device = distributed.join(device)
    distributed.check_same("flags", vars(args))
    reads_align_file = args.stage == "align" or DEFENSES[args.defense].reads_align_file
    tokenizer = Tokenizer(args.model, args.template_date)
    files = mixture.read_files(args, reads_align_file)
    model = load_with_adapters(args, device, dtype)
    data = mixture.read_data(model, tokenizer, args, files, choice.choose_anchors,
                             attacks.change_rows)
    n_updates = updates_per_epoch(len(data.examples), args.batch_size) * args.epochs
    paths = weight_paths(args.model, args.adapter) | data_paths(args, reads_align_file)
    worked_out = work_out(model, data, n_updates, files.n_removed)
    distributed.check_same("rows", worked_out["rows_sha256"])
    sizes = [path.stat().st_size for path in paths["model"]]
    distributed.check_same("weights, by the sizes of their files", sizes)
    settings = distributed.by_the_first(lambda: run_settings(command, args, worked_out, paths))
    dir = distributed.by_the_first(lambda: choose_dir(args))
    run = open_run(dir, settings, args.resume)
    try:
        if not run.finished:
            fine_tune(run, model, tokenizer, data, args)
    finally:
        run.close()
    writes = distributed.is_first()
    distributed.leave()
    if not writes:
        return
    print(report(run.dir))
    missing = unjudged_at_the_end(run.dir)
    if missing:
        raise RunFailed(f"{missing}; the adapter and result.json are in {run.dir}. See that the "
                        f"judge answers, then python eval.py --run {run.dir} asks it again.")


def main(argv=None) -> int:
    """0 done, 2 the user's mistake, 3 the run failed and can be resumed, 130 interrupted."""
    command = ["train.py", *(sys.argv[1:] if argv is None else argv)]
    name = distributed.program("train.py")

    def work() -> None:
        with distributed.among_others():
            execute(parse(argv), command)

    return exit_code(name, work, resumable=True)


if __name__ == "__main__":
    distributed.end(main())
