"""The exactness rules E1 to E5 and E7, on random models in which no two dimensions are equal.

E1 one pass = block by block. E2 no leak. E3 the parent inside. E4 padding is nothing. E5 reading leaves no trace.
E7 no noise, no difference.
"""

import itertools

import pytest
import torch
from conftest import MASK, noisy, tiny_model, tokens
from reference import blockwise_logits, error, parent_of
from transformers import DynamicCache

from arclm import streams_arclm


pytestmark = pytest.mark.usefixtures("no_grad")
# a block of one token, blocks inside a chunk of the delta rule, and the chunk itself
BLOCK_SIZES = [1, 4, 16, 64]
VARIANTS = [
    {"context_attention": context, "right_shift_logits": shift, "block_size": block_size}
    for context, shift, block_size in itertools.product(["block_causal", "causal"], [False, True], BLOCK_SIZES)
]


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of rows [n] of any lengths, with 0 as padding on the left."""
    width = max(map(len, rows))
    pad = [torch.zeros(width - len(row), dtype=torch.long) for row in rows]
    return {
        "input_ids": torch.stack([torch.cat(pair) for pair in zip(pad, rows, strict=True)]),
        "attention_mask": torch.stack(
            [torch.cat((p, torch.ones_like(row))) for p, row in zip(pad, rows, strict=True)]
        ),
    }


# E1


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
@pytest.mark.parametrize("length", [3, 75, 130])
def test_e1_one_pass_equals_block_by_block(variant, length):
    model = tiny_model(**variant)
    x_0 = tokens(2, length)
    x_t = noisy(x_0)
    one_pass = model(x_0, noisy_input_ids=x_t).logits
    assert 0.3 < one_pass.std() < 3  # the tolerance means something at logits of scale 1
    assert error(one_pass, blockwise_logits(model, x_0, x_t)) < 1e-4


def test_e1_holds_for_blocks_longer_than_a_chunk_and_for_a_kernel_of_one():
    for changes in ({"block_size": 128}, {"block_size": 20}, {"block_size": 16, "linear_conv_kernel_dim": 1}):
        model = tiny_model(**changes)
        x_0 = tokens(1, 2 * changes["block_size"] + 5)
        x_t = noisy(x_0)
        assert error(model(x_0, noisy_input_ids=x_t).logits, blockwise_logits(model, x_0, x_t)) < 1e-4


def test_e1_holds_with_eager_attention_whose_mask_is_added_to_the_scores():
    model = tiny_model()
    x_0 = tokens(2, 75)
    x_t = noisy(x_0)
    expected = model(x_0, noisy_input_ids=x_t).logits
    model.set_attn_implementation("eager")
    assert error(model(x_0, noisy_input_ids=x_t).logits, expected) < 1e-5
    assert error(blockwise_logits(model, x_0, x_t), expected) < 1e-4


def test_e1_holds_for_a_smaller_block_than_the_trained_one():
    model, trained_smaller = tiny_model(block_size=64), tiny_model(block_size=16)
    x_0 = tokens(2, 75)
    x_t = noisy(x_0)
    logits = model(x_0, noisy_input_ids=x_t, block_size=16).logits
    assert torch.equal(logits, trained_smaller(x_0, noisy_input_ids=x_t).logits)


# E2


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_e2_no_leak_between_streams_and_blocks(variant):
    model = tiny_model(**variant)
    block_size, length = variant["block_size"], 4 * variant["block_size"] + 3
    n = slice(2 * block_size, 3 * block_size)
    x_0 = tokens(2, length)
    x_t = noisy(x_0)
    base = model.model(x_0, noisy_input_ids=x_t)

    other_noise = torch.where(tokens(2, length, seed=1) % 2 == 0, MASK, x_0)
    changed = model.model(x_0, noisy_input_ids=other_noise)
    assert torch.equal(changed.clean_last_hidden_state, base.clean_last_hidden_state)
    assert not torch.equal(changed.last_hidden_state, base.last_hidden_state)

    later = x_0.clone()
    later[:, n.start :] = tokens(2, length, seed=2)[:, n.start :]
    assert torch.equal(model(later, noisy_input_ids=x_t).logits[:, n], model(x_0, noisy_input_ids=x_t).logits[:, n])

    for block in (slice(block_size, 2 * block_size), slice(3 * block_size, length)):
        x_t_m = x_t.clone()
        x_t_m[:, block] = tokens(2, length, seed=3)[:, block]
        logits = model(x_0, noisy_input_ids=x_t_m).logits
        assert torch.equal(logits[:, n], model(x_0, noisy_input_ids=x_t).logits[:, n])


def test_e2_the_noisy_block_does_read_every_earlier_clean_block():
    """The counterpart of no leak: a model that ignores the context would pass it."""
    model = tiny_model(block_size=16)
    x_0 = tokens(1, 80)
    x_t = noisy(x_0)
    base = model(x_0, noisy_input_ids=x_t).logits
    for position in (0, 15, 16, 63):
        x_0_m = x_0.clone()
        x_0_m[:, position] = (x_0_m[:, position] + 1) % MASK
        assert error(model(x_0_m, noisy_input_ids=x_t).logits[:, 64:], base[:, 64:]) > 1e-4


# E3


@pytest.mark.parametrize("length", [1, 7, 64, 65, 130])
@pytest.mark.parametrize("tied", [True, False])
def test_e3_the_clean_stream_is_the_parent(length, tied):
    model = tiny_model(context_attention="causal", tie_word_embeddings=tied)
    parent = parent_of(model)
    x = tokens(2, length)
    assert error(model(x).logits, parent(x).logits) < 1e-4


def test_e3_block_size_one_is_causal():
    model = tiny_model(block_size=1, context_attention="block_causal")
    x = tokens(2, 75)
    assert error(model(x).logits, parent_of(model)(x).logits) < 1e-4


def test_e3_with_a_cache_in_pieces_of_any_length():
    model = tiny_model(context_attention="causal")
    x = tokens(2, 80)
    cache, pieces = None, []
    for piece in x.split([1, 16, 2, 37, 1, 23], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert error(torch.cat(pieces, 1), parent_of(model)(x).logits) < 1e-4


@pytest.mark.parametrize("rope_type", ["linear", "yarn", "llama3"])
def test_e3_with_a_scaled_rotary_embedding(rope_type):
    rope = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = tiny_model(context_attention="causal", rope_parameters=rope)
    x = tokens(1, 75)
    assert error(model(x).logits, parent_of(model)(x).logits) < 1e-4


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", "other"])
def test_a_rotary_embedding_that_changes_with_the_length_is_refused(rope_type):
    rope = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    with pytest.raises(
        ValueError, match=rf"rope_type='{rope_type}' does not go with a cache of rotated keys\. Choose"
    ):
        tiny_model(rope_parameters=rope)


# E4


@pytest.mark.parametrize("variant", VARIANTS[::3], ids=lambda v: "-".join(map(str, v.values())))
@pytest.mark.parametrize("side", ["left", "right"])
def test_e4_padding_is_nothing(variant, side):
    model = tiny_model(**variant)
    rows = [tokens(1, n, seed=n)[0] for n in (5, 41, 23)]
    batch = left_padded(rows)
    if side == "right":
        batch = {name: value.flip(1) for name, value in batch.items()}
        rows = [row.flip(0) for row in rows]
    x_t = torch.where(batch["attention_mask"].bool(), noisy(batch["input_ids"]), 0)
    clean = model(**batch).logits
    two = model(**batch, noisy_input_ids=x_t).logits
    for i, row in enumerate(rows):
        own = batch["attention_mask"][i].bool()
        assert error(clean[i, own], model(row[None]).logits[0]) < 1e-4
        assert error(two[i, own], model(row[None], noisy_input_ids=x_t[i, own][None]).logits[0]) < 1e-4


def test_e4_a_cache_of_rows_of_unequal_length():
    """Row 0 commits nothing, row 1 one block, row 2 two: then each denoises its own next block."""
    model = tiny_model(block_size=4, right_shift_logits=True)
    x_0, block = tokens(3, 8), noisy(tokens(3, 4, seed=1))
    attention_mask = (torch.arange(8) < torch.tensor([[0], [4], [8]])).long()
    cache = model(x_0, attention_mask=attention_mask, use_cache=True).past_key_values
    logits = model(noisy_input_ids=block, past_key_values=cache).logits
    for i, length in enumerate((0, 4, 8)):
        own = model(x_0[i : i + 1, :length], use_cache=True).past_key_values if length else None
        assert error(logits[i], model(noisy_input_ids=block[i : i + 1], past_key_values=own).logits[0]) < 1e-4


# E5


@pytest.mark.parametrize("variant", VARIANTS[::3], ids=lambda v: "-".join(map(str, v.values())))
def test_e5_reading_leaves_no_trace(variant):
    model = tiny_model(**variant)
    block_size = variant["block_size"]
    cache = model(tokens(2, 2 * block_size), use_cache=True).past_key_values
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in flat(cache)]
    block = noisy(tokens(2, block_size, seed=1))
    first = model(noisy_input_ids=block, past_key_values=cache).logits
    model(noisy_input_ids=tokens(2, block_size, seed=2), past_key_values=cache)
    assert torch.equal(model(noisy_input_ids=block, past_key_values=cache).logits, first)
    model(tokens(2, block_size, seed=3), past_key_values=cache, use_cache=False)
    for old, new in zip(before, flat(cache), strict=True):
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_a_commit_and_the_next_denoising_step_in_one_pass_equal_the_two(variant):
    model, block_size = tiny_model(**variant), variant["block_size"]
    prompts = left_padded([tokens(1, n * block_size, seed=n)[0] for n in (3, 1, 2)])
    one, two = (model(**prompts, use_cache=True).past_key_values for _ in range(2))
    for seed, goes_on in ((1, [1, 1, 1]), (2, [1, 0, 1]), (3, [1, 1, 0])):  # 0 keeps its context
        block, following = tokens(3, block_size, seed=seed), noisy(tokens(3, block_size, seed=seed + 7))
        mask = None if all(goes_on) else torch.tensor(goes_on)[:, None].expand_as(block)
        model(block, mask, past_key_values=two, use_cache=True)
        expected = model(noisy_input_ids=following, past_key_values=two, output_hidden_states=True)
        both = model(block, mask, noisy_input_ids=following, past_key_values=one, output_hidden_states=True)
        assert error(both.logits, expected.logits) < 1e-4
        assert error(both.hidden_states[1], expected.hidden_states[1]) < 1e-4
        for a, b in zip(flat(one), flat(two), strict=True):
            if isinstance(a, torch.Tensor) and a.ndim == 4 and a.shape == b.shape:
                assert error(a, b) < 1e-4
    columns = one.token_mask[:, None, :, None]
    assert all(a is None or error(a * columns, b * columns) < 1e-4 for a, b in zip(one.keys, two.keys, strict=True))
    assert torch.equal(one.lengths, two.lengths)
    assert all(torch.equal(one.row_token_ids(row), two.row_token_ids(row)) for row in range(3))
    assert error(one.last_hidden_state, two.last_hidden_state) < 1e-4


def flat(cache) -> list:
    """Everything a cache holds."""
    return [x for value in vars(cache).values() for x in (value if isinstance(value, list) else [value])]


# E7


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shift", [False, True])
def test_e7_without_noise_both_streams_agree(block_size, shift):
    model = tiny_model(block_size=block_size, right_shift_logits=shift, context_attention="block_causal")
    x_0 = tokens(2, 75)
    outputs = model.model(x_0, noisy_input_ids=x_0)
    assert error(outputs.last_hidden_state, outputs.clean_last_hidden_state) < 1e-4
    clean, noisy_logits = model(x_0).logits, model(x_0, noisy_input_ids=x_0).logits
    if shift:
        assert error(noisy_logits[:, 1:], clean[:, :-1]) < 1e-4
    else:
        assert error(noisy_logits, clean) < 1e-4


# forward


def test_labels_give_the_weighted_unshifted_loss():
    model = tiny_model()
    x_0 = tokens(2, 75)
    x_t = noisy(x_0)
    labels = torch.where(x_t == MASK, x_0, -100)
    weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0))
    output = model(x_0, noisy_input_ids=x_t, labels=labels, loss_weights=weights, num_items_in_batch=13)
    log_probs = model(x_0, noisy_input_ids=x_t).logits.log_softmax(-1).gather(2, x_0[..., None])[..., 0]
    expected = -(log_probs * weights)[labels != -100].sum() / 13
    assert output.logits is None
    assert error(output.loss, expected) < 1e-5


def test_labels_that_the_clean_stream_has_read_are_said(monkeypatch):
    x, warned = tokens(2, 16), []
    monkeypatch.setattr(streams_arclm.logger, "warning_once", warned.append)
    for inputs in ({"noisy_input_ids": x, "labels": x}, {}):
        tiny_model()(x, **inputs)
    for reads_no_successor in ({"context_attention": "causal"}, {"block_size": 1}):
        tiny_model(**reads_no_successor)(x, labels=x)
    assert not warned
    tiny_model()(x, labels=x)
    assert len(warned) == 1
    assert warned[0].startswith("labels without noisy_input_ids teach nothing")


@pytest.mark.parametrize("shift", [False, True])
def test_clean_loss_weights_add_the_ar_loss_of_the_clean_stream(shift):
    model, x_0 = tiny_model(context_attention="causal", right_shift_logits=shift), tokens(2, 75)
    x_t = noisy(x_0)
    inputs = {"noisy_input_ids": x_t, "labels": torch.where(x_t == MASK, x_0, -100), "num_items_in_batch": 13}
    weights = torch.rand(x_0.shape, generator=torch.Generator().manual_seed(0))
    weights[:, :30] = 0
    log_probs = model(x_0).logits[:, :-1].log_softmax(-1).gather(2, x_0[:, 1:, None])[..., 0]
    expected = model(x_0, **inputs).loss - (log_probs * weights[:, :-1]).sum() / 13
    assert error(model(x_0, **inputs, clean_loss_weights=weights).loss, expected) < 1e-5
    mean = model(x_0, **inputs | {"num_items_in_batch": None}, clean_loss_weights=(weights > 0).float()).loss
    expected = model(x_0, **inputs | {"num_items_in_batch": None}).loss - log_probs[:, 30:].mean()
    assert error(mean, expected) < 1e-5


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_only_noisy_blocks_with_labels_are_read_and_nothing_else_changes(shift, side):
    """Loss and gradients equal those of a pass that reads every noisy block."""
    batch = left_padded([tokens(1, n, seed=n)[0] for n in (75, 41, 64)])
    if side == "right":
        batch = {name: value.flip(1) for name, value in batch.items()}
    x_0, is_token = batch["input_ids"], batch["attention_mask"].bool()
    x_t = torch.where(is_token, noisy(x_0), 0)
    labels = torch.where((x_t == MASK) & (torch.arange(75) % 40 > 24), x_0, -100)  # some blocks have none
    model = tiny_model(block_size=8, right_shift_logits=shift)
    with torch.enable_grad():
        loss = model(**batch, noisy_input_ids=x_t, labels=labels).loss
        logits = model(**batch, noisy_input_ids=x_t).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        grads = torch.autograd.grad(loss, list(model.parameters()))
        references = torch.autograd.grad(expected, list(model.parameters()))
    assert error(loss, expected) < 1e-5
    assert all(error(a, b) < 1e-5 for a, b in zip(grads, references, strict=True))

    # the clean stream ends before the last MLP, unless the logits before a block come from it
    columns = []
    model.model.layers[-1].mlp.register_forward_hook(lambda _, __, output: columns.append(output.shape[1]))
    model(**batch, noisy_input_ids=x_t, labels=labels)
    model(**batch, noisy_input_ids=x_t, labels=labels, output_hidden_states=True)
    assert columns == ([columns[1]] * 2 if shift else [columns[1] - 75, columns[1]])

    states = model.model(**batch, noisy_input_ids=x_t, needed=labels != -100).last_hidden_state
    assert (states == 0).all(-1)[is_token].any()


def test_gradient_checkpointing_changes_no_gradient():
    with torch.enable_grad():
        grads = []
        for checkpointing in (False, True):
            model = tiny_model().train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            x_0 = tokens(2, 40)
            model(x_0, noisy_input_ids=noisy(x_0), labels=x_0).loss.backward()
            grads.append([p.grad.clone() for p in model.parameters()])
    assert len(grads[0]) > 40
    assert all(error(a, b) < 1e-6 for a, b in zip(*grads, strict=True))


def test_logits_to_keep_and_tuple_output():
    model = tiny_model()
    x = tokens(2, 21)
    logits = model(x).logits
    assert torch.equal(model(x, logits_to_keep=3).logits, logits[:, -3:])
    chosen = x % 3 == 0
    assert error(model(x, logits_to_keep=chosen).logits, logits[chosen]) < 1e-6
    assert torch.equal(model(x, return_dict=False)[0], logits)
    assert len(model(x, output_hidden_states=True).hidden_states) == 6


def bad_calls():
    x = tokens(2, 16)
    return {
        "Neither input_ids nor noisy_input_ids": lambda m: m(),
        r"at least one token, got \[2, 0\]": lambda m: m(x[:, :0]),
        r"input_ids \[2, 16\] and noisy_input_ids \[2, 15\]": lambda m: m(x, noisy_input_ids=x[:, 1:]),
        "commit input_ids: leave use_cache=False out": lambda m: m(
            x, noisy_input_ids=x, past_key_values=m(x, use_cache=True).past_key_values, use_cache=False
        ),
        r"With input_ids the cache would hold \[32, 28\] tokens per row, not multiples of block_size=16": lambda m: m(
            x,
            (torch.arange(16) >= torch.tensor([[0], [4]])).long(),
            noisy_input_ids=x,
            past_key_values=m(x, use_cache=True).past_key_values,
        ),
        r"input_ids \[2, 16\] and noisy_input_ids \[1, 16\]": lambda m: m(
            x, noisy_input_ids=x[:1], past_key_values=m(x, use_cache=True).past_key_values
        ),
        "noisy_input_ids has 17 tokens, a denoising step reads one block of at most 16": lambda m: m(
            noisy_input_ids=tokens(2, 17)
        ),
        r"block_size=17 is outside \[1, 16\]": lambda m: m(x, block_size=17),
        r"attention_mask must be \[2, 16\]": lambda m: m(x, attention_mask=torch.ones(2, 15)),
        "past_key_values holds 2 rows, the input 1": lambda m: m(
            noisy_input_ids=x[:1], past_key_values=m(x, use_cache=True).past_key_values
        ),
        "past_key_values has 5 layers, this model 1": lambda m: tiny_model(
            num_hidden_layers=1, layer_types=["full_attention"]
        )(noisy_input_ids=x, past_key_values=m(x, use_cache=True).past_key_values),
        r"The cache holds \[13, 13\] tokens per row, not multiples of block_size=16": lambda m: m(
            noisy_input_ids=x, past_key_values=m(x[:, :13], use_cache=True).past_key_values
        ),
        r'clean_loss_weights do not go with context_attention="block_causal"': lambda m: m(
            x, noisy_input_ids=x, labels=x, clean_loss_weights=torch.ones(2, 16)
        ),
        r"clean_loss_weights \[2, 15\] want input_ids, noisy_input_ids and labels": lambda m: tiny_model(
            context_attention="causal"
        )(x, noisy_input_ids=x, labels=x, clean_loss_weights=torch.ones(2, 15)),
        r"clean_loss_weights \[2, 16\] want .* For an AR loss alone": lambda m: tiny_model(context_attention="causal")(
            x, labels=x, clean_loss_weights=torch.ones(2, 16)
        ),
        r"made with block_size=4, and this call has 2": lambda m: m(
            noisy_input_ids=x[:, :2], past_key_values=m(x, block_size=4, use_cache=True).past_key_values, block_size=2
        ),
        "past_key_values is a DynamicCache": lambda m: m(x, past_key_values=DynamicCache()),
        r"labels has ids from 66 to 97, outside the vocabulary \[0, 97\)": lambda m: m(
            x, labels=torch.arange(66, 98).view(2, 16)
        ),
        r"labels must be \[2, 16\]": lambda m: m(x, noisy_input_ids=x, labels=x[:, 1:]),
        r"loss_weights must be \[2, 16\]": lambda m: m(x, noisy_input_ids=x, labels=x, loss_weights=torch.ones(2, 1)),
    }


@pytest.mark.parametrize("sentence", bad_calls())
def test_bad_input_gets_a_sentence(sentence):
    with pytest.raises(ValueError, match=sentence):
        bad_calls()[sentence](tiny_model())


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="unknown arguments position_idz"):
        tiny_model()(tokens(1, 4), position_idz=1)
    with pytest.raises(TypeError, match="unknown arguments inputs_embeds, start"):
        tiny_model()(tokens(1, 4), inputs_embeds=torch.zeros(1, 4, 8), start=0)


def test_a_cache_does_not_go_with_gradient_checkpointing():
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    with torch.enable_grad(), pytest.raises(ValueError, match="does not go with gradient checkpointing"):
        model(tokens(1, 16), use_cache=True)
    # without gradients nothing is computed twice
    logits = model(tokens(1, 16), use_cache=True).logits
    assert torch.equal(logits, model.eval()(tokens(1, 16)).logits)
