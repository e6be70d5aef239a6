"""Whether `model.py` is π0: outputs of the published PyTorch policies (tests/fixtures/golden), and cases for `pi0 infer`.

  check.py golden                 compares with every π0 case of tests/fixtures/golden; fails above 1e-4
  check.py case CHECKPOINT FILE   writes inputs and this module's outputs, for `pi0 infer --case FILE`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

from model import Pi0, size_of  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
TABLE = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


def load(folder: Path) -> Pi0:
    """A checkpoint folder in LeRobot's layout."""
    config = json.loads((folder / "config.json").read_text())
    tensors = {name.removeprefix("model."): t.float() for name, t in load_file(folder / "model.safetensors").items()}
    if TABLE in tensors:
        tensors[LM_HEAD] = tensors.pop(TABLE)
    size = size_of(
        tensors,
        config["chunk_size"],
        config.get("vision_num_attention_heads", 16),
        config.get("min_period", 0.004),
        config.get("max_period", 4.0),
    )
    model = Pi0(size)
    wanted = model.state_dict().keys()
    model.load_state_dict({name: tensors[name] for name in wanted})
    return model.eval()


def outputs(model: Pi0, case: dict[str, torch.Tensor], steps: int = 10) -> dict[str, torch.Tensor]:
    count = sum(name.startswith("in.image.") for name in case)
    images = torch.stack([case[f"in.image.{i}"] for i in range(count)])[None].float()
    out = model.act(
        images,
        case["in.tokens"].reshape(1, -1).long(),
        case["in.token_mask"].reshape(1, -1).bool(),
        case["in.state"].reshape(1, -1).float(),
        case["in.noise"][None].float(),
        steps,
        case["in.image_mask"].reshape(1, -1).bool(),
    )
    return {name: value[0] for name, value in out.items()}


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def golden() -> int:
    worst = 0.0
    for folder in sorted((ROOT / "tests/fixtures/golden").glob("pi0_*")):
        case = load_file(folder / "case.safetensors")
        out = outputs(load(folder), case)
        found = {name: distance(out[name], case[f"out.{name}"]) for name in ("prefix_embs", "v", "actions") if f"out.{name}" in case}
        print(folder.name, {name: f"{value:.1e}" for name, value in found.items()})
        worst = max(worst, *found.values())
    return 0 if worst < 1e-4 else 1


def case(checkpoint: Path, file: Path) -> int:
    model = load(checkpoint)
    size = model.size
    random = torch.Generator().manual_seed(1)
    made = {f"in.image.{i}": torch.rand(3, size.image, size.image, generator=random) * 2 - 1 for i in range(2)}
    made |= {
        "in.image_mask": torch.ones(2),
        "in.tokens": torch.tensor([2, 313, 264, 271, 286, 202], dtype=torch.int32),
        "in.token_mask": torch.ones(6),
        "in.state": torch.randn(size.state_dim, generator=random),
        "in.noise": torch.randn(size.horizon, size.action_dim, generator=random),
    }
    made |= {f"out.{name}": value for name, value in outputs(model, made).items()}
    save_file({name: value.contiguous() for name, value in made.items()}, file)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(2)
    if sys.argv[1:] == ["golden"]:
        sys.exit(golden())
    if len(sys.argv) == 4 and sys.argv[1] == "case":
        sys.exit(case(Path(sys.argv[2]), Path(sys.argv[3])))
    sys.exit(__doc__)
