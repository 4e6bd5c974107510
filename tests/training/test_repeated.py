"""Strategy "batch": which inputs belong to the batch, and what is said of those that cannot be told."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.errors import InputsError
from tests.training.models import tokens

B, N = 4, 3
ROWS = torch.arange(1.0, 1 + B * 5).view(B, 5)


class Seeing(nn.Module):
    """Keeps what it was called with."""

    def forward(self, x, **kwargs):
        self.seen = kwargs
        return F.dropout(x, 0.5, self.training)


def seen(**kwargs):
    model = Seeing()
    regraft.stochastic_passes(model, N, ROWS, strategy="batch", **kwargs)
    return model.seen


def test_tensors_of_the_batch_are_repeated_wherever_they_are():
    mask = torch.arange(B * 5).view(B, 5)
    found = seen(mask=mask, nested={"deep": [mask, (mask[:, 0], None)]})
    assert torch.equal(found["mask"], torch.cat([mask] * N))
    assert torch.equal(found["nested"]["deep"][0], torch.cat([mask] * N))
    assert torch.equal(found["nested"]["deep"][1][0], torch.cat([mask[:, 0]] * N))
    assert found["nested"]["deep"][1][1] is None


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        0.5,
        True,
        "text",
        torch.float32,
        torch.tensor(2.0),
        torch.ones(1, 5),
        torch.ones(7),
        [1, 2],
        ["a"],
    ],
)
def test_what_has_no_batch_is_left_alone(value):
    assert seen(extra=value)["extra"] is value or seen(extra=value)["extra"] == value


def test_names_that_are_never_of_the_batch():
    positions, weights = torch.arange(B), torch.rand(B)
    found = seen(cache_position=positions, class_weights=weights, unbatched=("class_weights",))
    assert found["cache_position"] is positions
    assert found["class_weights"] is weights


def test_a_list_as_long_as_the_batch_is_named():
    with pytest.raises(InputsError, match="'sizes' has 4 entries, as many as the batch"):
        seen(sizes=[(1, 2)] * B)
    assert seen(sizes=[(1, 2)] * B, unbatched=("sizes",))["sizes"] == [(1, 2)] * B


def test_an_object_is_named_and_auto_goes_on():
    with pytest.raises(InputsError, match="'graph' is a object, which cannot be repeated"):
        seen(graph=object())
    assert regraft.stochastic_passes(Seeing(), N, ROWS, graph=object()).shape == (N, B, 5)


def test_packed_sequences():
    packed = nn.utils.rnn.pack_padded_sequence(
        torch.randn(4, 5, 6), torch.tensor([5, 4, 4, 2]), batch_first=True
    )
    model = nn.GRU(6, 6, 2, dropout=0.5)
    with pytest.raises(InputsError, match="PackedSequence"):
        regraft.stochastic_passes(model, 2, packed, strategy="batch")
    for strategy in ("auto", "shared", "loop"):
        outputs, last = regraft.stochastic_passes(model, 2, packed, strategy=strategy)
        assert outputs.data.shape == (2, 15, 6)
        assert not torch.equal(last[0], last[1])


def test_a_forward_that_fails_names_what_was_not_repeated():
    class Adds(nn.Module):
        def forward(self, x, bias):
            return F.dropout(x, 0.5) + bias.repeat_interleave(2)[:, None]

    with pytest.raises(InputsError, match=r"not repeated.*bias \(2,\)"):
        regraft.stochastic_passes(Adds(), 2, ROWS, bias=torch.ones(2), strategy="batch")
    assert regraft.stochastic_passes(Adds(), 2, ROWS, bias=torch.ones(2)).shape == (2, B, 5)


def test_no_tensor_no_batch():
    class Makes(nn.Module):
        def forward(self, size):
            return F.dropout(torch.ones(2, size), 0.5)

    with pytest.raises(InputsError, match="no input is a tensor with a batch axis"):
        regraft.stochastic_passes(Makes(), 2, 5, strategy="batch")
    assert regraft.stochastic_passes(Makes(), 2, 5).shape == (2, 2, 5)


class Flat(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5).flatten(0, 1)


@pytest.mark.parametrize("output", [Flat(), nn.LSTM(5, 4, 2, dropout=0.5, batch_first=True)])
def test_outputs_whose_first_axis_is_not_the_batch_are_refused_by_name(output):
    x = torch.randn(B, 3, 5)
    with pytest.raises(InputsError, match="whose first axis is not the batch"):
        regraft.stochastic_passes(output, 2, x, strategy="batch")
    passes = regraft.stochastic_passes(output, 2, x)
    if isinstance(output, nn.LSTM):
        assert passes[1][0].shape == (2, 2, B, 4)
    else:
        assert passes.shape == (2, B * 3, 5)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": 99,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    return GPT2LMHeadModel(GPT2Config(**settings))


@pytest.mark.parametrize("strategy", ["auto", "shared", "batch", "loop"])
def test_a_cache_of_keys_and_values_is_each_passs_own(strategy):
    model, ids = gpt2().eval(), tokens(2, 8)
    whole = model(input_ids=ids).logits[:, 5:]
    cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    outputs = regraft.stochastic_passes(
        model, 2, input_ids=ids[:, 5:], past_key_values=cache, strategy=strategy
    )
    for one in outputs.logits:
        torch.testing.assert_close(one, whole, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 5
    assert outputs.past_key_values is None


def test_a_cache_that_was_asked_for_is_refused_by_name():
    with pytest.raises(InputsError, match="DynamicCache"):
        regraft.stochastic_passes(gpt2(), 2, input_ids=tokens(2, 8), use_cache=True, strategy="batch")


def test_inputs_are_given_as_everywhere_else():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(3, 2))
    x = torch.ones(4, 3)
    both = regraft.stochastic_passes(model, 2, x), regraft.stochastic_passes(model, 2, inputs=x)
    assert both[0].shape == both[1].shape == (2, 4, 2)
    assert regraft.mc_predict(model, 4, inputs=(x,)).mean.shape == (4, 2)
    loss = regraft.multisample_loss(model, torch.mean, 3, inputs=x)
    assert loss.shape == ()
    with pytest.raises(regraft.errors.InputsError, match="and more are given"):
        regraft.stochastic_passes(model, 2, x, inputs=x)

    class Own(torch.nn.Module):
        def forward(self, inputs):
            return torch.nn.functional.dropout(inputs, 0.5)

    assert regraft.stochastic_passes(Own(), 2, inputs=x).shape == (2, 4, 3)
