"""Fine-tune a timm ViT on images with accelerate: plain, with R-Drop, and with grafted dropouts.

    pip install -e ".[recipes]"
    python recipes/vit.py                                             # offline, about 1 minute on 2 cores
    python recipes/vit.py --model vit_base_patch16_224 --data FOLDER  # pretrained weights from the hub

The default is a small but real job on scikit-learn's scans of handwritten digits: a small ViT learns 0 to 5,
then is fine-tuned on a few labelled examples each of 6 to 9 and tested on all the others. FOLDER holds
train/CLASS/*.jpg and val/CLASS/*.jpg, or the four idx files of FashionMNIST, also gzipped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import regraft

SHOTS = 6  # labelled examples of each new digit
EPOCHS, BATCH = 40, 16  # passes over them, images a step
LEARNING_RATE = 1e-3  # of AdamW, decayed to 0 by a cosine; high, since the model is small
WEIGHT_DECAY, MOMENTUM = 0.05, 0.9  # the usual ones for ViTs
ALPHA, RATE = 1.0, 0.1  # weight of R-Drop's KL, rate of the ViT's own dropouts
RULES = {"Dropout": "gaussian", "Linear@head": "dropconnect(p=0.2)"}
SMALL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
RATES = {"drop_rate": RATE, "attn_drop_rate": RATE, "proj_drop_rate": RATE}

METHODS = {
    "baseline": lambda model: model,
    "R-Drop": lambda model: regraft.rdrop(model, alpha=ALPHA, criterion=cross_entropy),
    "grafted": lambda model: (console.print(regraft.apply(model, options.regularize)), model)[1],
}

console = Console(width=None if sys.stdout.isatty() else 100)


def main() -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    create, train, test = folder_job() if options.data else digits_job()
    console.print(f"{len(train)} labelled images, {len(test)} held out")
    curves: dict[str, list[list[tuple[int, float]]]] = {method: [] for method in METHODS}
    for method, prepare in METHODS.items():
        for seed in range(options.seeds):
            set_seed(seed)
            model = prepare(create())
            curves[method].append(fit(model, train, test, f"{method}, seed {seed}", options.epochs))
    save_table(curves)
    save_plot(curves)
    regraft.save_plan(model, options.output)  # the grafts of the last model, as regraft.json
    save_plain(model, create)


def fit(model, train, test, title: str, epochs: int) -> list[tuple[int, float]]:
    """Train `model` in place; its accuracy on `test` after each tenth of the epochs."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    settings = {"betas": (options.momentum, 0.999), "weight_decay": options.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, **settings)
    loader = DataLoader(train, batch_size=BATCH, shuffle=True)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    curve = []
    with Progress(console=console) as progress:
        task = progress.add_task(title, total=steps)
        for epoch in range(1, epochs + 1):
            wrapped.train()
            for images, labels in loader:
                optimizer.zero_grad()
                own = title.startswith("R-Drop")  # the model returns the loss, of two passes
                made = wrapped(images, labels=labels)[0] if own else cross_entropy(wrapped(images), labels)
                accelerator.backward(made)
                optimizer.step()
                schedule.step()
                progress.advance(task)
            if test and epoch % max(1, epochs // 10) == 0:
                curve.append((epoch * len(loader), accuracy(wrapped, test, accelerator.device)))
    return curve


@torch.no_grad()
def accuracy(model, test, device) -> float:
    model.eval()
    right = sum((model(x.to(device)).argmax(-1).cpu() == y).sum().item() for x, y in DataLoader(test, 256))
    return right / len(test)


def digits_job():
    """A ViT pretrained on the digits 0 to 5; a few labelled images of 6 to 9; the rest of those."""
    from sklearn.datasets import load_digits

    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 8 - 1
    old, new = labels < 6, labels >= 6
    set_seed(0)
    pretrained = timm.create_model("vit_tiny_patch16_224", num_classes=6, **SMALL, **RATES)
    known, epochs = TensorDataset(images[old], labels[old]), min(10, options.epochs)
    fit(pretrained, known, None, "pretraining on the digits 0 to 5", epochs)
    weights = {name: value for name, value in pretrained.state_dict().items() if not name.startswith("head.")}

    def create():
        model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **SMALL, **RATES)
        model.load_state_dict(weights, strict=False)  # only the head is new
        return model

    order = torch.randperm(int(new.sum()), generator=torch.Generator().manual_seed(0))
    images, labels = images[new][order], labels[new][order] - 6
    few = torch.cat([(labels == digit).nonzero()[: options.shots, 0] for digit in range(4)])
    rest = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, few, value=False)
    return create, TensorDataset(images[few], labels[few]), TensorDataset(images[rest], labels[rest])


def folder_job():
    from torchvision.datasets import ImageFolder

    settings = timm.data.resolve_model_data_config(timm.create_model(options.model))
    if (options.data / "train").is_dir():
        train = ImageFolder(options.data / "train", timm.data.create_transform(**settings, is_training=True))
        test = ImageFolder(options.data / "val", timm.data.create_transform(**settings))
        classes = len(train.classes)
    else:
        train, test = (idx_images(part, settings["input_size"][-1]) for part in ("train", "t10k"))
        classes = int(train.tensors[1].max()) + 1
    made = {"pretrained": not options.scratch, "num_classes": classes, **RATES}
    return lambda: timm.create_model(options.model, **made), train, test


def idx_images(part: str, size: int) -> TensorDataset:
    arrays = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        file = next(options.data.glob(f"{part}-{kind}-ubyte*"))
        raw = (gzip.open if file.suffix == ".gz" else open)(file, "rb").read()
        arrays.append(torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).copy()))
    images = arrays[0].view(len(arrays[1]), 1, 28, 28).float() / 127.5 - 1
    images = torch.nn.functional.interpolate(images, size=size).expand(-1, 3, -1, -1)
    return TensorDataset(images, arrays[1].long())


def save_table(curves) -> None:
    table = Table("method", "accuracy", "std", title=f"held-out images, {options.seeds} seeds")
    rows = {method: [run[-1][1] for run in runs] for method, runs in curves.items()}
    for method, last in rows.items():
        table.add_row(method, f"{statistics.mean(last):.3f}", f"{statistics.pstdev(last):.3f}")
    console.print(table)
    (options.output / "results.json").write_text(json.dumps(rows, indent=2) + "\n")


def save_plot(curves) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for method, runs in curves.items():
        values = np.array([[value for _, value in run] for run in runs])
        axes.plot([step for step, _ in runs[0]], values.mean(0), marker="o", label=method)
    axes.set(xlabel="step", ylabel="held-out accuracy, mean of the seeds")
    axes.legend()
    figure.savefig(options.output / "curves.png", dpi=150)


def save_plain(model, create) -> None:
    """Revert, save, and load the weights strictly into a model that never saw regraft."""
    torch.save(regraft.revert(model).state_dict(), file := options.output / "model.pt")
    create().load_state_dict(torch.load(file, weights_only=True), strict=True)
    console.print(f"plain checkpoint in {file}: loads without regraft, no missing and no unexpected key")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="a model of timm, for --data")
    parser.add_argument("--scratch", action="store_true", help="without pretrained weights")
    parser.add_argument("--data", type=Path, help="a folder of images; default: scikit-learn's digits")
    parser.add_argument("--regularize", nargs="+", default=RULES, help="such as Dropout=gaussian")
    for name, kind, value in (
        ("shots", int, SHOTS), ("epochs", int, EPOCHS), ("lr", float, LEARNING_RATE),
        ("weight-decay", float, WEIGHT_DECAY), ("momentum", float, MOMENTUM), ("seeds", int, 3),
        ("output", Path, Path("output/vit")),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=value, help=f"default: {value}")
    made = parser.parse_args()
    if made.regularize is not RULES:
        made.regularize = [rule.split("=", 1) for rule in made.regularize]
    return made


if __name__ == "__main__":
    options = parse()
    main()
