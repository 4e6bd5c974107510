"""Passes that share a forward, of models sharded by FSDP2, beside those of the whole model. Run by test_passes_sharded.py."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import regraft
from tests.training.models import headed_bert, images, tokens, vit

GRAFTS = {
    "plain": None,
    "module": {"Dropout": "gaussian"},
    "weights": {"Linear@**.{classifier,head,score}": "dropconnect(p=0.2)"},
}


def llama():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=99, pad_token_id=0, **sizes))
    regraft.apply(model, {"before:Linear@score": "dropout(p=0.3)"})
    return model, model.model.layers, {"input_ids": tokens()}


def bert():
    model = headed_bert()
    return model, model.bert.encoder.layer, {"input_ids": tokens()}


def timm_vit():
    model = vit(drop_rate=0.3)
    return model, model.blocks, {"x": images()}


MODELS = {"bert": bert, "vit": timm_vit, "llama": llama}


def gradients(model, inputs, options):
    torch.manual_seed(5 + dist.get_rank())
    passes = regraft.stochastic_passes(model, 2, **options, **inputs)
    passes = passes if isinstance(passes, torch.Tensor) else passes.logits
    passes.square().sum().backward()
    return passes.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(name, graft, options):
    found = []
    for shard in (False, True):
        torch.manual_seed(0)
        model, layers, inputs = MODELS[name]()
        model.train()
        if GRAFTS[graft]:
            regraft.apply(model, GRAFTS[graft], inputs=inputs)
        if shard:
            for layer in layers:
                fully_shard(layer)
            fully_shard(model)
        for _ in range(2):  # the second time by what the first has found out
            model.zero_grad()
            passes, grads = gradients(model, inputs, options)
        assert not torch.equal(passes[0], passes[1])
        found.append((passes, grads))
    (whole, expected), (sharded, grads) = found
    torch.testing.assert_close(sharded, whole)
    assert grads.keys() == expected.keys()
    for key, grad in grads.items():
        dist.all_reduce(expected[key])
        torch.testing.assert_close(
            grad.full_tensor(), expected[key] / dist.get_world_size(), rtol=1e-4, atol=1e-5
        )


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in MODELS:
        for graft in GRAFTS:
            check(name, graft, {"strategy": "shared"})
    check("bert", "plain", {"strategy": "auto"})
    check("bert", "plain", {"strategy": "shared", "fork": "bert.encoder.layer.1"})
    check("bert", "plain", {"strategy": "batch"})
    # One rank's rows are equal, the others' are not: all loop.
    model, inputs = (
        torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(6, 2)).train(),
        torch.randn(4, 6),
    )
    fully_shard(model[1])
    fully_shard(model)
    rows = []
    model[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    inputs = inputs[:1].expand(4, 6) if dist.get_rank() else inputs
    regraft.stochastic_passes(model, 2, inputs).sum().backward()
    assert rows[-2:] == [4, 4], rows
    dist.barrier()
    print("agreed")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
