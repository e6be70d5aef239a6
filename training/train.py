"""Trains the policy of the demo: draws demonstrations, learns them by flow matching, plays the task, writes a checkpoint.

    python training/train.py --out checkpoints/touch

on one GPU; README.md beside this says what it needs and what came out.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import checkpoint  # noqa: E402
import expert  # noqa: E402
from model import Pi0, Size  # noqa: E402
from prompts import BOS, sentences, tokenizer_json  # noqa: E402
from sim_arm import CAMERAS, JOINTS  # noqa: E402
from touch import COLOURS  # noqa: E402

TOKENS = 10  # the longest wording of the task, padded
HELD_OUT = 0.02  # part of the samples that is not trained on
GRIPPER = len(JOINTS) - 1  # its actions are positions, all others differences to the state
MIDDLE, SPREAD = torch.tensor([0.32, 0.0]), torch.tensor([0.07, 0.13])  # of the blocks' places, m


class Data:
    """The demonstrations on the device, and how they are normalised."""

    def __init__(self, folder: Path, device: torch.device, tokenizer: str, size: Size):
        rows = np.load(folder / "rows.npy")
        whole = len(rows) == len(np.load(folder / "state.npy", mmap_mode="r"))

        def load(name: str) -> Tensor:
            array = np.load(folder / f"{name}.npy", mmap_mode="c")
            return torch.from_numpy(array if whole else array[rows]).to(device)

        self.images, state, action = load("image"), load("state"), load("action")
        self.colour = load("colour")
        self.target = (load("target") - MIDDLE.to(device)) / SPREAD.to(device)
        relative = action - state[:, None]
        relative[..., GRIPPER] = action[..., GRIPPER]
        self.stats = {"observation.state.mean": state.mean(0), "observation.state.std": state.std(0)}
        self.stats |= {"action.mean": relative.mean((0, 1)), "action.std": relative.std((0, 1))}
        self.stats = {name: value.float() for name, value in self.stats.items()}
        state, relative = self.normal("observation.state", state), self.normal("action", relative)
        pad = size.state_dim - state.shape[-1]
        self.state = F.pad(state, (0, pad))
        self.action = F.pad(relative, (0, pad))
        self.raw_state, self.raw_action = load("state"), action
        self.prompts, self.prompt_mask = prompts(tokenizer, device)
        self.count = len(state)
        self.held_out = max(1, int(HELD_OUT * self.count))

    def normal(self, feature: str, x: Tensor) -> Tensor:
        return (x - self.stats[f"{feature}.mean"]) / (self.stats[f"{feature}.std"] + 1e-8)

    def robot(self, actions: Tensor, state: Tensor) -> Tensor:
        """Normalised chunks to joint positions."""
        x = actions[..., : len(JOINTS)] * self.stats["action.std"] + self.stats["action.mean"]
        return torch.cat([x[..., :GRIPPER] + state[:, None, :GRIPPER], x[..., GRIPPER:]], -1)

    def batch(self, n: int) -> dict[str, Tensor]:
        at = torch.randint(self.held_out, self.count, (n,), device=self.images.device)
        wording = torch.randint(0, self.prompts.shape[1], (n,), device=at.device)
        # The wording of the demo more often than the others.
        wording = torch.where(torch.rand(n, device=at.device) < 0.3, 0, wording)
        return self.rows(at, wording) | {"images": augmented(self.images[at])}

    def rows(self, at: Tensor, wording: Tensor) -> dict[str, Tensor]:
        return {
            "tokens": self.prompts[self.colour[at], wording],
            "token_mask": self.prompt_mask[self.colour[at], wording],
            "state": self.state[at],
            "action": self.action[at],
            "target": self.target[at],
        }


def prompts(tokenizer: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [colour, wording, TOKENS] and which of them are there."""
    from tokenizers import Tokenizer

    reader = Tokenizer.from_str(tokenizer)
    ids = [[reader.encode(s + "\n").ids for s in sentences(c)] for c in COLOURS]
    assert all(i[0] == BOS and len(i) <= TOKENS for row in ids for i in row)
    padded = torch.tensor([[i + [0] * (TOKENS - len(i)) for i in row] for row in ids], device=device)
    lengths = torch.tensor([[len(i) for i in row] for row in ids], device=device)
    return padded, torch.arange(TOKENS, device=device) < lengths[..., None]


def planes(images: Tensor) -> Tensor:
    """uint8 [b, views, side, side, 3] to [b, views, 3, side, side] in [-1, 1]."""
    return images.permute(0, 1, 4, 2, 3).contiguous().float() / 127.5 - 1


def augmented(images: Tensor) -> Tensor:
    """Exposure, contrast, tint and sensor noise, each view its own."""
    x = planes(images)
    shape = (*x.shape[:2], 1, 1, 1)
    like = {"device": x.device}
    contrast = 1 + 0.15 * (2 * torch.rand(shape, **like) - 1)
    brightness = 0.12 * (2 * torch.rand(shape, **like) - 1)
    tint = 0.05 * torch.randn(*x.shape[:2], 3, 1, 1, **like)
    return (x * contrast + brightness + tint + 0.02 * torch.randn_like(x)).clamp(-1, 1)


class Learner(nn.Module):
    """The flow-matching loss, and a small one that helps to find the block: its place, read off the last prompt token."""

    def __init__(self, model: Pi0, draws: int):
        super().__init__()
        self.model, self.draws = model, draws
        self.place = nn.Linear(model.size.trunk.width, 2)

    def forward(self, images: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor, action: Tensor, target: Tensor,
                time: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """`time` [b·draws], `noise` [b·draws, horizon, action_dim]: several per observation, for the prefix is the
        larger part of the work."""
        model, size = self.model, self.model.size
        x = model.embed_prefix(images, tokens)
        there = torch.ones(len(x), x.shape[1] - tokens.shape[1], dtype=torch.bool, device=x.device)
        valid = torch.cat([there, token_mask], 1)
        cache, last = model.prefix(x, valid)
        ends = there.shape[1] + token_mask.sum(1) - 1
        found = self.place(last[torch.arange(len(last), device=last.device), ends])
        many = self.draws
        cache = [(k.repeat_interleave(many, 0), v.repeat_interleave(many, 0)) for k, v in cache]
        valid, state, action = (t.repeat_interleave(many, 0) for t in (valid, state, action))
        t = time[:, None, None]
        v = model.velocity(cache, valid, state, t * noise + (1 - t) * action, time)
        # Padded columns mean nothing.
        flow = F.mse_loss(v[..., : len(JOINTS)].float(), (noise - action)[..., : len(JOINTS)])
        return flow, F.mse_loss(found.float(), target)


def groups(learner: nn.Module, decay: float) -> list[dict]:
    matrices = [p for n, p in learner.named_parameters() if p.ndim > 1 and "embed" not in n and "lm_head" not in n]
    rest = [p for n, p in learner.named_parameters() if p.ndim <= 1 or "embed" in n or "lm_head" in n]
    return [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


class Run:
    """The model under training with its average and its optimiser."""

    def __init__(self, size: Size, options: argparse.Namespace, device: torch.device):
        torch.manual_seed(options.seed)
        model = Pi0(size)
        if options.resume:
            stored = load_file(options.resume / "model.safetensors")
            model.load_state_dict({name.removeprefix("model."): value.float() for name, value in stored.items()})
        self.learner = Learner(model, options.draws).to(device)
        self.average = copy.deepcopy(self.learner.model)
        self.optimiser = torch.optim.AdamW(
            groups(self.learner, options.decay), lr=options.lr, betas=(0.9, 0.95), fused=device.type == "cuda"
        )
        self.forward = torch.compile(self.learner, dynamic=False) if options.compile else self.learner
        self.device, self.size, self.options = device, size, options

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        many = len(batch["state"]) * self.options.draws
        # Beta(1.5, 1) by inverting its distribution function.
        when = torch.rand(many, device=self.device) ** (1 / 1.5) * 0.999 + 0.001
        noise = torch.randn(many, self.size.horizon, self.size.action_dim, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.forward(**batch, time=when, noise=noise)

    def warm_up(self) -> None:
        """Compiles forward and backward on noise, while the demonstrations are still being drawn. Everything is laid
        out as in a real batch, or the compiler would begin again."""
        size, n = self.size, self.options.batch
        like = {"device": self.device}
        grey = torch.full((n, len(CAMERAS), size.image, size.image, 3), 128, dtype=torch.uint8, **like)
        batch = {
            "images": augmented(grey),
            "tokens": torch.full((n, TOKENS), BOS, **like),
            "token_mask": torch.ones(n, TOKENS, dtype=torch.bool, **like),
            "state": torch.randn(n, size.state_dim, **like),
            "action": torch.randn(n, size.horizon, size.action_dim, **like),
            "target": torch.randn(n, 2, **like),
        }
        sum(self.loss(batch)).backward()
        self.optimiser.zero_grad(set_to_none=True)


def train(run: Run, data: Data, until: float) -> tuple[Pi0, list[tuple]]:
    """Trains until the monotonic clock says `until`; the learning rate falls to zero by then."""
    learner, average, optimiser, options = run.learner, run.average, run.optimiser, run.options
    begun = time.monotonic()
    curve, step = [], 0
    pairs = list(zip(average.parameters(), learner.model.parameters()))
    while True:
        part = (time.monotonic() - begun) / max(until - begun, 1.0)
        if part >= 1 or step == options.steps:
            break
        rate = options.lr * min(1.0, part / 0.03 + 1e-3) * 0.5 * (1 + math.cos(math.pi * part))
        for group in optimiser.param_groups:
            group["lr"] = rate
        flow, place = run.loss(data.batch(options.batch))
        loss = flow + options.place * place
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            keep = min(options.ema, step / (step + 10))
            torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - keep)
        step += 1
        if step % 20 == 0 and run.device.type == "cuda":
            # Not ahead of the clock by a long queue.
            torch.cuda.synchronize()
        if step % 100 == 0 or step == options.steps:
            curve.append((step, time.monotonic() - begun, flow.item(), place.item()))
            if step % 500 == 0 or step == 100:
                print(f"step {step}  {curve[-1][1]:.0f} s  flow {flow.item():.4f}  place {place.item():.4f}  norm {norm.item():.2f}", flush=True)
    print(f"trained {step} steps, {step * options.batch} observations, {time.monotonic() - begun:.0f} s", flush=True)
    return average.eval(), curve


@torch.no_grad()
def offline_error(model: Pi0, data: Data, device: torch.device) -> str:
    """Fingertip error after half a second and at the chunk's end, on samples not trained on."""
    at = torch.arange(min(data.held_out, 512), device=device)
    rows = data.rows(at, torch.zeros_like(at))
    noise = torch.randn(len(at), model.size.horizon, model.size.action_dim, device=device)
    out = model.act(planes(data.images[at]), rows["tokens"], rows["token_mask"], rows["state"], noise)["actions"]
    chunks = data.robot(out, data.raw_state[at]).cpu().numpy().astype(float)
    right = data.raw_action[at].cpu().numpy().astype(float)
    gap = np.linalg.norm(expert.hand_of(chunks)[..., :3] - expert.hand_of(right)[..., :3], axis=-1) * 1e3
    say = ", ".join(f"action {k}: median {np.median(gap[:, k]):.1f} mm, p90 {np.percentile(gap[:, k], 90):.1f} mm" for k in (2, 10, 31))
    return f"held out, fingertip error at {say}"


def actor(model: Pi0, data: Data, device: torch.device):
    """What rollouts ask: chunks for images, states and colours."""
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(1, model.size.horizon, model.size.action_dim, generator=random).to(device)

    def act(images: np.ndarray, states: np.ndarray, colours: list[str]) -> np.ndarray:
        state = torch.from_numpy(states).to(device)
        seen = planes(torch.from_numpy(images).to(device))
        index = torch.tensor([COLOURS.index(c) for c in colours], device=device)
        normal = F.pad(data.normal("observation.state", state), (0, model.size.state_dim - len(JOINTS)))
        out = model.act(seen, data.prompts[index, 0], data.prompt_mask[index, 0],
                        normal, noise.expand(len(state), -1, -1))["actions"]
        return data.robot(out, state).cpu().numpy().astype(float)

    return act


def plot(curve: list[tuple], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, _, flow, place = zip(*curve)
    figure, axes = pyplot.subplots(figsize=(7, 3.2), dpi=110)
    axes.semilogy(steps, flow, label="flow matching", lw=1)
    axes.semilogy(steps, place, label="place of the block (training only)", lw=1)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint; curve and log go there too")
    parser.add_argument("--data", type=Path, default=Path("/tmp/touch-data"), help="folder of the demonstrations; made if missing")
    parser.add_argument("--scenes", type=int, default=12_650)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=219.0, help="of training; the learning rate falls to zero by then")
    parser.add_argument("--until", type=float, help="instead of --seconds: end of the training, from the start of this program")
    parser.add_argument("--data-seconds", type=float, default=float("inf"), help="stop drawing demonstrations then")
    parser.add_argument("--resume", type=Path, help="begin with the weights of this checkpoint")
    parser.add_argument("--steps", type=int, default=-1, help="at most so many steps")
    parser.add_argument("--batch", type=int, default=256, help="observations")
    parser.add_argument("--draws", type=int, default=4, help="noises and times per observation")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--decay", type=float, default=0.02)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--place", type=float, default=0.3, help="weight of the auxiliary loss")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--episodes", type=int, default=192, help="to play with the finished policy")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    options = parser.parse_args()
    begun = time.monotonic()
    drawing = None
    if not (options.data / "rows.npy").exists():
        # A process of its own: this one holds the GPU.
        drawing = subprocess.Popen([
            sys.executable, Path(__file__).parent / "data.py", options.data, "--scenes", str(options.scenes),
            "--processes", str(options.processes), "--most-seconds", str(options.data_seconds),
        ])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    size = Size()
    run = Run(size, options, device)
    if options.compile:
        try:
            run.warm_up()
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises: it is only faster
            print(f"not compiled: {str(error)[:500]}", flush=True)
            run.forward = run.learner
        print(f"compiled after {time.monotonic() - begun:.0f} s", flush=True)
    if drawing and drawing.wait() != 0:
        return 1
    tokenizer = tokenizer_json(COLOURS)
    data = Data(options.data, device, tokenizer, size)
    print(f"{data.count} samples on {device} after {time.monotonic() - begun:.0f} s", flush=True)
    until = begun + options.until if options.until else time.monotonic() + options.seconds
    model, curve = train(run, data, until)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    # What is judged is what is written: rounded weights.
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    torch.set_float32_matmul_precision("highest")
    stats = {name: value.cpu().numpy() for name, value in data.stats.items()}
    checkpoint.write(options.out, model, stats, tokenizer, JOINTS, CAMERAS, expert.RATE_HZ)
    (options.out / "loss.json").write_text(json.dumps([[round(x, 5) for x in row] for row in curve]))
    plot(curve, options.out / "loss.png")
    print(offline_error(model, data, device), flush=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if options.episodes:
        from rollout import Arms, summary

        arms = Arms(min(options.processes, options.episodes))
        print(f"played: {summary(arms.run(list(range(options.episodes)), actor(model, data, device)))}", flush=True)
        arms.close()
    print(f"done after {time.monotonic() - begun:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
