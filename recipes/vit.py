"""Fine-tune a timm ViT on few images with accelerate: as it comes, with R-Drop, with Gaussian dropout.

    pip install -e ".[recipes]"
    python recipes/vit.py                                             # offline, about 2 minutes on 2 cores
    python recipes/vit.py --model vit_base_patch16_224 --data FOLDER  # pretrained weights from the hub

The default is a small but real job on scikit-learn's scans of handwritten digits: a small ViT learns 0 to 5,
then is fine-tuned on 6 labelled examples each of 6 to 9, drawn anew by each of 3 seeds, and tested on 400
others. 3 seeds show how it is done; they rank nothing: docs/results.md has more. The loop is an ordinary
one, with the loss outside the model. FOLDER holds train/CLASS/*.jpg and val/CLASS/*.jpg, or the four idx
files of FashionMNIST, also gzipped.
"""

from __future__ import annotations

import gzip
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import shared
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

import regraft

FROZEN = 2  # lower blocks that keep their weights, with the patch embedding; their dropout is off
SHOTS = 6  # labelled examples of each new digit
HELD_OUT = 400  # images of the new digits for the results
STEPS, BATCH = 120, 16  # optimizer steps, images a step
LEARNING_RATE = 1e-3  # of AdamW, decayed to 0 by a cosine; high, since the model is small
WEIGHT_DECAY, MOMENTUM = 0.05, 0.9  # the usual ones for ViTs
RATE = 0.3  # of the dropouts in R-Drop and grafted; the baseline has 0.1
ALPHA = 2.0  # weight of R-Drop's KL, beside the mean of the two cross-entropies
RDROP = {"Dropout": f"dropout(p={RATE})"}
GRAFTED = {"Dropout": f"gaussian(p={RATE})"}  # noise of the same variance as dropout at this rate
SMALL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
RATES = {"drop_rate": 0.1, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1}


def main() -> None:
    create, drawn, test = folder_job() if options.data else digits_job()
    methods = {"baseline": {}, "R-Drop": RDROP, "grafted": options.regularize}
    runs: dict[str, list[dict]] = {method: [] for method in methods}
    for seed in range(options.seeds):
        train = drawn(seed)
        if seed == 0:
            shared.say(f"{len(train)} labelled images, {len(test)} held out")
        for method, rules in methods.items():
            set_seed(seed)
            model = create()
            off = freeze(model)
            report = regraft.apply(model, rules | off) if rules or off else None
            if seed == 0 and report:
                shared.say(report)
            shared.say(f"{method}, seed {seed}")
            began = time.perf_counter()
            predict = fit(model, train, options.steps, rdrop=method == "R-Drop")
            seconds = time.perf_counter() - began
            runs[method].append(shared.measures(*predict(test)) | {"seconds": seconds})
    shared.save_runs(options, runs, f"{len(test)} held-out images")
    regraft.save_plan(model, options.output)  # the grafts of the last model, as regraft.json
    save_plain(model, create)


def freeze(model) -> dict[str, str]:
    """Hold the lower blocks fixed; the rules that take their dropout out, which has nothing to teach them."""
    if options.scratch or not options.frozen:
        return {}
    model.requires_grad_(requires_grad=False)
    for part in (*model.blocks[options.frozen :], model.norm, model.head):
        part.requires_grad_(requires_grad=True)
    return {f"Dropout@blocks.{{0..{options.frozen - 1}}}.**": "off", "Dropout@pos_drop": "off"}


def fit(model, train, steps: int, *, rdrop: bool = False) -> Callable:
    """Train `model` in place; a function that gives its logits and the labels of a dataset."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    settings = {"betas": (options.momentum, 0.999), "weight_decay": options.weight_decay}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, options.lr, **settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loader = DataLoader(train, batch_size=BATCH, shuffle=True)
    criterion = cross_entropy
    if rdrop:
        criterion = regraft.rdrop_criterion(model, criterion, alpha=ALPHA)  # the loop stays as it is
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    wrapped.train()
    again_and_again = itertools.chain.from_iterable(itertools.repeat(loader))
    for images, labels in itertools.islice(again_and_again, steps):
        optimizer.zero_grad()
        loss = criterion(wrapped(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def predict(test) -> tuple[np.ndarray, np.ndarray]:
        wrapped.eval()
        made = [(wrapped(x.to(accelerator.device)).double().cpu(), y) for x, y in DataLoader(test, 256)]
        logits, labels = map(torch.cat, zip(*made, strict=True))
        return logits.numpy(), labels.numpy()

    return predict


def digits_job():
    """A ViT pretrained on the digits 0 to 5; a few labelled images of 6 to 9 by seed; others to test on."""
    from sklearn.datasets import load_digits

    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 8 - 1
    old, new = labels < 6, labels >= 6
    set_seed(0)
    pretrained = timm.create_model("vit_tiny_patch16_224", num_classes=6, **SMALL, **RATES)
    fit(pretrained, TensorDataset(images[old], labels[old]), min(680, 10 * options.steps))  # 10 epochs
    weights = {name: value for name, value in pretrained.state_dict().items() if not name.startswith("head.")}

    def create():
        model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **SMALL, **RATES)
        model.load_state_dict(weights, strict=False)  # only the head is new
        return model

    order = torch.randperm(int(new.sum()), generator=torch.Generator().manual_seed(0))
    images, labels = images[new][order], labels[new][order] - 6
    pool = TensorDataset(images[HELD_OUT:], labels[HELD_OUT:])
    test = TensorDataset(images[:HELD_OUT], labels[:HELD_OUT])
    return create, lambda seed: few(pool, labels[HELD_OUT:], seed), test


def few(images, labels: torch.Tensor, seed: int) -> Subset:
    """The labelled images of a seed: so many of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = [order[labels[order] == label][: options.shots] for label in range(int(labels.max()) + 1)]
    return Subset(images, torch.cat(chosen).tolist())


def folder_job():
    """Images of a folder, of which each seed takes the same number of each class."""
    from torchvision.datasets import ImageFolder

    settings = timm.data.resolve_model_data_config(timm.create_model(options.model))
    if (options.data / "train").is_dir():
        train = ImageFolder(options.data / "train", timm.data.create_transform(**settings, is_training=True))
        test = ImageFolder(options.data / "val", timm.data.create_transform(**settings))
        labels = torch.tensor(train.targets)
    else:
        train, test = (idx_images(part, settings["input_size"][-1]) for part in ("train", "t10k"))
        labels = train.tensors[1]
    made = {"pretrained": not options.scratch, "num_classes": int(labels.max()) + 1, **RATES}
    return lambda: timm.create_model(options.model, **made), lambda seed: few(train, labels, seed), test


def idx_images(part: str, size: int) -> TensorDataset:
    arrays = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        file = next(options.data.glob(f"{part}-{kind}-ubyte*"))
        raw = (gzip.open if file.suffix == ".gz" else open)(file, "rb").read()
        arrays.append(torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).copy()))
    images = arrays[0].view(len(arrays[1]), 1, 28, 28).float() / 127.5 - 1
    images = torch.nn.functional.interpolate(images, size=size).expand(-1, 3, -1, -1)
    return TensorDataset(images, arrays[1].long())


def save_plain(model, create) -> None:
    """Revert, save, and load the weights strictly into a model that never saw regraft."""
    torch.save(regraft.revert(model).state_dict(), file := options.output / "model.pt")
    create().load_state_dict(torch.load(file, weights_only=True), strict=True)
    shared.say(f"plain checkpoint in {file}: loads without regraft, no missing and no unexpected key")


def parse():
    made = shared.parser(
        __doc__, {}, frozen=FROZEN, shots=SHOTS, steps=STEPS, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY,
        momentum=MOMENTUM, seeds=3,
    )  # fmt: skip
    made.add_argument("--model", default="vit_base_patch16_224", help="a model of timm, for --data")
    made.add_argument("--scratch", action="store_true", help="without pretrained weights")
    made.add_argument("--data", type=Path, help="a folder of images; default: scikit-learn's digits")
    made.add_argument("--regularize", nargs="+", help=f"rules of the grafted model; default: {GRAFTED}")
    options = shared.parse(made)
    options.regularize = shared.rules(options.regularize, GRAFTED)
    return options


if __name__ == "__main__":
    options = parse()
    main()
