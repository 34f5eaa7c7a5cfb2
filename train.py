"""Fine-tune an aligned model on an upload that may hold harmful rows, with or without a defence.

    python train.py --anchors 1 --lambda 50                     # the embedded model, SBR
    python train.py --defense sft                               # the same attack, undefended
    python train.py --model DIR --data FILE.jsonl --anchor-file A.txt --harmful-file T.txt

Per update, over a batch of rows (the user's) and K anchors (the service's):

    L_total = L_CE + lambda * L_safe
    L_CE    = mean negative log likelihood of the supervised tokens of the whole batch
    L_safe  = distance of h at the anchors from the aligned model's h_ref       see anchors.py

AdamW with the learning rate falling linearly to zero is the paper's ("Loss & Training"); the zero
weight decay is its code's (HFT_SBR.py:165-178 of soyoaaa/SBR at 188990b), the clip its Trainer's.
"""

import signal
import sys

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from anchors import Anchors, FinalNorm, encode
from baselines import STAGES, booster, deepalign, ewc, lisa, t_vaccine, vaccine
from cli import COUNT, POSITIVE, Parser, at_least, epoch_list, exit_code
from data import mixture
from data.batches import batch_at, largest_pass
from data.kept import Store
from data.provenance import describe
from data.tasks import check_rule
from distributed import add_place, forecast_bytes
from eval import JUDGING, evaluate, judge_flags
from generate import BATCH, load_aligned
from judges import open_judge
from lora import adapted, trainable
from model import UserError, to_fp32
from paper.report import report
from runs import Log, Run
from stress import attacks
from stress.probes import make_probe
from tokenizer import Tokenizer


def make_sbr_step(model, tokenizer, args):
    """L_total = L_CE + lambda * L_safe; h is the final RMSNorm's output: all the head sees."""
    anchors = Anchors(model, tokenizer, args)  # phase 1: h_ref (K, C), before the first update

    def step(batch):
        ce = safe = torch.zeros((), device=batch.device)
        for pack in batch.packs(with_=anchors.ids):  # cut by token budget; anchors in the first
            with FinalNorm(model) as h:  # (N, C), the bottleneck, caught as it passes
                logits = model(pack.ids, pack.seqlens, rows=pack.supervised)  # (R, V)
            ce_sum = F.cross_entropy(to_fp32(logits), pack.targets, reduction="sum")
            loss = ce_sum / batch.n_supervised  # the whole batch's count: no cut changes it
            if pack.anchor_rows is not None:
                l_safe = anchors.loss(h.value[pack.anchor_rows])  # (K, C) against h_ref
                loss = loss + args.lam * l_safe  # L_total = L_CE + lambda * L_safe
                safe = l_safe.detach()
            loss.backward()
            ce = ce + ce_sum.detach() / batch.n_supervised
        return {"loss": ce + args.lam * safe, "ce": ce, "safe": safe}  # on the device: no sync

    return step


# A defence is one function, make_step(model, tokenizer, args) -> step; step(batch) leaves the
# gradient in .grad and returns numbers to log; step.state, if it has one, is tensors to checkpoint.
# Plain fine-tuning is lambda = 0: it logs its own drift for free.
DEFENSES = {"sbr": make_sbr_step, "sft": make_sbr_step, "lisa": lisa.make_step,
            "ewc": ewc.make_step, "deepalign": deepalign.make_step, "vaccine": vaccine.make_step,
            "t-vaccine": t_vaccine.make_step, "booster": booster.make_step}


def updates(step_fn, batch_of, optimizer, *, lr, grad_clip, n_steps, start=0):
    """The one training loop: yields (step, numbers) after each update; lr falls linearly to 0."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(start, n_steps):
        batch, now = batch_of(step), lr * (1 - step / n_steps)
        for group in optimizer.param_groups:
            group["lr"] = now
        numbers = step_fn(batch)  # leaves the gradient in .grad
        grad_norm = clip_grad_norm_(params, grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield step, {"batch": batch.name, "tokens": batch.n_tokens, **numbers,
                     "grad_norm": grad_norm, "lr": now}


def train(run, model, tokenizer, examples, suite, judge, step_fn, optimizer, probe, args) -> dict:
    """All updates, evaluations and checkpoints from where the folder stands -> what was done."""
    device = model.model.embed_tokens.weight.device
    n_steps, per_epoch = args.n_steps, args.n_steps // args.epochs
    start, done = run.start(model, optimizer, step_fn)
    # Reading a number waits for a GPU, hence in groups; 20 is our choice, not yet measured.
    log, stop = Log(run, done, every=1 if device.type == "cpu" else 20), Stop()

    def batch_of(step):
        return batch_at(examples, step, args.batch_size, args.seed, args.tokens_per_pass,
                                device)

    def evaluate_if_due(epoch):
        if epoch in args.eval_epochs:
            done["evals"][str(epoch)], records = evaluate(model, tokenizer, suite, args, epoch,
                                                          judge, Store(None))
            run.write("generations", *records)
        if epoch in args.probes:
            done["probes"][str(epoch)] = probe()

    if start == 0:
        evaluate_if_due(0)
    with tqdm(total=n_steps, initial=start, desc="training", unit="update", disable=None) as bar:
        log.restart_clock()
        for step, numbers in updates(step_fn, batch_of, optimizer, lr=args.lr,
                                     grad_clip=args.grad_clip, n_steps=n_steps, start=start):
            log.add(step, numbers)
            bar.update()
            epoch, into = divmod(step + 1, per_epoch)
            if into == 0 or stop.asked:
                log.flush()
                if into == 0:
                    tqdm.write(line(epoch, done))
                    evaluate_if_due(epoch)
                if stop.asked or epoch % args.save_every == 0:
                    run.save(model, optimizer, step_fn, step + 1, done)
                log.restart_clock()
            if stop.asked:
                raise KeyboardInterrupt
    return done


def line(epoch: int, done: dict) -> str:
    """One line an epoch: its last update's numbers, and the run's mean speed."""
    last = dict(done["last"])
    for name in ("step", "batch", "tokens"):
        del last[name]
    return (f"epoch {epoch:3}  " + "  ".join(f"{k} {v:.4g}" for k, v in last.items())
            + f"  {done['tokens'] / done['seconds']:,.0f} tokens/s")


class Stop:
    """The first Ctrl-C (or SIGTERM) asks for a checkpoint after the update; the second stops."""

    def __init__(self):
        self.asked = False
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, self._ask)

    def _ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def parse(argv=None):
    """The flags, in four groups."""
    p = Parser("train.py", __doc__.splitlines()[0])
    mixture.add_flags(p.add_argument_group("model and data"))
    defence_flags(p.add_argument_group("defence"))
    attacks.add_flags(p.add_argument_group("attack"))
    for rival in (lisa, ewc, deepalign, vaccine, t_vaccine, booster):
        rival.add_flags(p.add_argument_group(rival.__name__.replace("baselines.", "--defense ")))
    optimiser_flags(p.add_argument_group("optimisation (defaults: the paper's)"))
    output_flags(p.add_argument_group("evaluation and output"))
    return settle(p.parse_args(argv))


def defence_flags(g):
    g.add_argument("--defense", choices=DEFENSES, default="sbr", help="sft is lambda 0")
    g.add_argument("--stage", choices=("finetune", "align"),
                   help="on the upload, or before it on --align-file (default: the defence's own)")
    g.add_argument("--anchors", type=at_least(int, 0), default=8, metavar="K",
                   help="harmful prompts held; 0 is plain fine-tuning")
    g.add_argument("--lambda", dest="lam", type=at_least(float, 0), default=50.0, metavar="L",
                   help="weight of L_safe; with --defense sft it is 0")
    g.add_argument("--reduction", choices=("mean", "sum"), default="mean",
                   help="over the C numbers of h: mean as the paper's code, sum as its formula")
    g.add_argument("--anchor-file", help="own anchor pool: a prompt a line, or JSONL")


def optimiser_flags(g):
    g.add_argument("--rank", type=COUNT, default=16, help="rank of the adapters")
    g.add_argument("--alpha", type=POSITIVE, default=16.0, help="they are scaled by alpha / rank")
    g.add_argument("--rslora", action="store_true", help="by alpha / sqrt(rank) instead")
    g.add_argument("--lr", type=POSITIVE, default=1e-5, help="falls linearly to 0")
    g.add_argument("--epochs", type=COUNT, default=20, help="passes over the upload")
    g.add_argument("--batch-size", type=COUNT, default=32, help="rows an update")
    g.add_argument("--beta1", type=at_least(float, 0, at_most=0.9999), default=0.9, help="of AdamW")
    g.add_argument("--grad-clip", type=POSITIVE, default=1.0, help="largest gradient norm")
    g.add_argument("--tokens-per-pass", type=COUNT, default=16384,
                   help="a larger batch is cut: less memory, the same gradient")
    g.add_argument("--seed", type=at_least(int, 0, at_most=2**31 - 1), default=0,
                   help="draws adapters, order of rows and anchors")
    g.add_argument("--recompute", action="store_true",
                   help="run each block again in backward: less memory, the same gradient, slower")
    add_place(g)


def output_flags(g):
    g.add_argument("--eval-epochs", type=epoch_list, help="as 0,5,20 (default: 0 and the last)")
    g.add_argument("--probes", type=epoch_list, default=[], help="when stress/probes.py measures")
    g.add_argument("--eval-n", type=COUNT, default=500, help="test prompts of a kind at most")
    judge_flags(g)
    g.set_defaults(**JUDGING)
    g.add_argument("--out", help="folder (default runs/<task>-<defense>-K<k>-lam<l>-s<seed>)")
    g.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    g.add_argument("--save-every", type=COUNT, default=1, help="epochs between checkpoints")


def settle(args):
    """Defaults that depend on other flags."""
    args.task = args.task or (None if args.data else "sst2")
    stages = STAGES.get(args.defense, ("finetune",))
    args.stage = args.stage or stages[0]
    if args.stage not in stages:
        raise UserError(f"--defense {args.defense} lacks stage {args.stage}, expected {stages[0]}.")
    if args.data and args.stage == "align":
        raise UserError("--data was given for the stage align, which reads --align-file; drop one.")
    args.poison = 0.0 if args.data or args.stage == "align" else args.poison
    attacks.check(args)
    args.lam = args.lam if args.defense == "sbr" else 0.0
    check_rule(args.task, args.fa_rule)
    if args.keep_adapter and not args.adapter:
        raise UserError("--keep-adapter was given without --adapter; name the adapter to train on.")
    args.eval_epochs = args.eval_epochs or [0, args.epochs]
    if max(args.eval_epochs + args.probes) > args.epochs:
        raise UserError(f"--eval-epochs or --probes is above --epochs {args.epochs}; lower it.")
    return args


def adapt(args):
    """The aligned model with the adapters that are trained; args then say what both are."""
    model = load_aligned(args)
    if args.max_len > model.config.max_positions:
        raise UserError(f"--max-len {args.max_len} is above the {model.config.max_positions} "
                        "positions that the model was trained for; lower it.")
    attacks.attach(model, args)
    model.model.recompute = args.recompute
    first, embedding = adapted(model)[0][1], model.model.embed_tokens.weight
    args.rank, args.alpha, args.rslora = first.rank, first.alpha, first.rslora
    args.device, args.dtype = embedding.device.type, str(embedding.dtype)[6:]
    return model


def execute(args) -> None:
    """Reads everything, then opens the folder, so that a mistake leaves nothing behind."""
    tokenizer = Tokenizer(args.model, args.template_date)
    examples, suite, told, longest = mixture.read(args, tokenizer, attacks.change_rows)
    model = adapt(args)
    args.n_steps = -(-len(examples) // args.batch_size) * args.epochs
    run = Run(args, describe(args))
    if not run.finished:
        step_fn = DEFENSES[args.defense](model, tokenizer, args)
        params = trainable(model)
        optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(args.beta1, 0.999),
                                      weight_decay=0.0, fused=True)
        probe = args.probes and make_probe(model, tokenizer, suite, args, optimizer)
        n_trained = sum(p.numel() for p in params)
        n_base = sum(p.numel() for p in model.parameters()) - n_trained
        largest = largest_pass(examples, encode(tokenizer, args.anchor_prompts), args)
        n_replies = min(BATCH, sum(map(len, suite.values())))
        judge = open_judge(args, run.dir)  # before the forecast: it may be a model, too
        forecast = forecast_bytes(model, args, *largest, n_replies, longest)
        print(f"{args.model}: {n_base:,} parameters, frozen, {args.dtype} on {args.device}; "
              f"{n_trained:,} in adapters, trained\n{told}\n"
              f"memory: about {forecast / 1e6:,.0f} MB\n"
              f"commit {str(run.settings['git'])[:7]}, torch {torch.__version__}; "
              f"all settings, versions and digests: {run.dir / 'config.json'}")
        done = train(run, model, tokenizer, examples, suite, judge, step_fn, optimizer, probe,
                     args)
        merged = f" + {args.adapter}, merged" if args.adapter and not args.keep_adapter else ""
        run.finish(model, args.model + merged, done, forecast)
    print(report(run.dir))


def main(argv=None) -> int:
    """0 done, 2 the user's mistake, 3 the run failed and can be resumed, 130 interrupted."""
    return exit_code("train.py", lambda: execute(parse(argv)), resumable=True)


if __name__ == "__main__":
    sys.exit(main())
