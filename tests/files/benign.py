"""Files as people have them: models, weights, checkpoints, of torch, timm, Hugging Face, torchvision and others."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import io
import pathlib
import pickle

import torch
from torch import nn

UNKNOWN = ("sklearn", "joblib", "own")
"""What begins so holds names that regraft does not know: true unknown names."""


class Own(nn.Module):
    """A class of somebody's own."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)


def saved(value, **options):
    room = io.BytesIO()
    torch.save(value, room, **options)
    return room.getvalue()


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.1), nn.LayerNorm(8), nn.Linear(8, 2))


def trained():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    model(torch.zeros(1, 4)).sum().backward()
    optimizer.step()
    schedule.step()
    return model, optimizer, schedule


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))


def hugging_face():
    import transformers as t

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    yield "bert", bert()
    yield (
        "gpt2",
        t.GPT2LMHeadModel(t.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)),
    )
    yield "llama", t.LlamaForCausalLM(t.LlamaConfig(vocab_size=50, **sizes))
    yield "qwen2", t.Qwen2ForCausalLM(t.Qwen2Config(vocab_size=50, num_key_value_heads=2, **sizes))
    yield "vit", t.ViTForImageClassification(t.ViTConfig(image_size=32, patch_size=16, **sizes))
    yield "roberta", t.RobertaModel(t.RobertaConfig(vocab_size=50, **sizes))
    yield "t5", t.T5Model(t.T5Config(vocab_size=50, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
    yield "clip", t.CLIPVisionModel(t.CLIPVisionConfig(image_size=32, patch_size=16, **sizes))


def benign_files():
    """`name -> content`."""
    import lightning
    import numpy as np
    import peft
    import timm
    import torchvision
    from safetensors.torch import save
    from transformers import TrainingArguments

    import regraft

    model, optimizer, schedule = trained()
    files = {
        "module": saved(model),
        "module, old": saved(model, _use_new_zipfile_serialization=False),
        **{f"module, pickle {protocol}": pickle.dumps(model, protocol) for protocol in (0, 1, 2, 3, 4, 5)},
        "state dict": saved(model.state_dict()),
        "state dict, old": saved(model.state_dict(), _use_new_zipfile_serialization=False),
        "state dict, pickle": pickle.dumps(model.state_dict()),
        "checkpoint": saved({"epoch": 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}),
        "checkpoint with arguments": saved({"args": argparse.Namespace(lr=0.1, out=pathlib.Path("x")), "model": model.state_dict(), "when": datetime.datetime.now()}),
        "optimizer": saved({"model": model, "optimizer": optimizer}),
        "optimizer.pt": saved(optimizer.state_dict()),
        "scheduler.pt": saved(schedule.state_dict()),
        "random states": saved({"model": model.state_dict(), "cpu": torch.get_rng_state(), "numpy": np.random.get_state(), "loss": np.float32(1)}),
        "NumPy generator": saved({"model": model.state_dict(), "rng": np.random.default_rng(0).bit_generator.state}),
        "sizes and dtypes": saved({"model": model.state_dict(), "size": torch.Size([1]), "dtype": torch.bfloat16, "device": torch.device("cpu")}),
        "containers": saved({"model": model.state_dict(), "a": collections.defaultdict(list), "b": collections.Counter("ab"), "c": {1, 2}, "d": collections.deque([1])}),
        "data parallel": saved(nn.DataParallel(net())),
        "averaged": saved(torch.optim.swa_utils.AveragedModel(net())),
        "transformer": saved(nn.Transformer(8, 2, 1, 1, 16)),
        "recurrent": saved(nn.ModuleDict({"lstm": nn.LSTM(4, 4, 2, dropout=0.1), "gru": nn.GRU(4, 4)})),
        "convolutions": saved(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())),
        "function as activation": saved(nn.TransformerEncoderLayer(8, 2, 16, activation=nn.functional.gelu)),
        "partial": saved({"model": net(), "layer": functools.partial(nn.LayerNorm, eps=1e-6)}),
        "sparse": saved({"model.weight": torch.eye(3).to_sparse()}),
        "quantized": saved({"model.weight": torch.quantize_per_tensor(torch.zeros(2, 2), 0.1, 0, torch.qint8)}),
        "meta": saved({"model.weight": torch.empty(2, 2, device="meta")}),
        "parameter list": saved(nn.ParameterList([nn.Parameter(torch.zeros(2))])),
        "safetensors": save(model.state_dict()),
        "grafted": saved(regraft.apply(grafted := net(), {"Dropout": "gaussian", "Linear": "dropconnect(p=0.1)"}) and grafted),
    }  # fmt: skip
    for name in (
        "test_vit",
        "test_resnet",
        "test_efficientnet",
        "test_convnext",
        "test_byobnet",
        "test_mambaout",
    ):
        files[f"timm {name}"] = saved(timm.create_model(name))
    for name in ("resnet18", "mobilenet_v3_small", "vit_b_16", "swin_t"):
        with torch.device("meta"):
            files[f"torchvision {name}"] = saved(torchvision.models.get_model(name))
    for name, made in hugging_face():
        files[f"transformers {name}"] = saved(made)
    files["peft"] = saved(peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"])))
    files["training_args.bin"] = saved(TrainingArguments("out", report_to=[], use_cpu=True))
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False)
    files["lightning"] = saved(
        {"state_dict": model.state_dict(), "pytorch-lightning_version": "2", "hyper_parameters": lightning.fabric.utilities.data.AttributeDict(lr=0.1), "loops": trainer.fit_loop.state_dict()}
    )  # fmt: skip
    files["own"] = saved(Own())
    files |= dict(scikit_learn())
    return files


def scikit_learn():
    import joblib
    import numpy as np
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import LabelEncoder

    rows, labels = np.array([[0.0], [1.0]]), [0, 1]
    yield "sklearn", pickle.dumps(LogisticRegression().fit(rows, labels))
    arrays = {
        "numbers": np.arange(6.0).reshape(2, 3),
        "none": np.zeros((0, 3), bool),
        "texts": np.array(["a", "bc"]),
        "objects": np.array([1, "x", None], dtype=object),
        "columns": np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
        "dates": np.array(["2020-01-01"], dtype="M8[D]"),
    }
    yield "arrays by joblib", dumped(joblib, arrays)
    yield "arrays by joblib, protocol 2", dumped(joblib, {"a": np.ones(3)}, protocol=2)
    yield "joblib", dumped(joblib, LogisticRegression().fit(rows, labels))
    yield "joblib, a forest", dumped(joblib, RandomForestClassifier(2).fit(rows, labels))
    yield "joblib, labels that are objects", dumped(joblib, LabelEncoder().fit(np.array(["a", "b"], object)))


def dumped(joblib, value, **options):
    room = io.BytesIO()
    joblib.dump(value, room, **options)
    return room.getvalue()
