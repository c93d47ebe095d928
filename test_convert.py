"""Laws of convert.py: SEA in models of many families, on random weights that take seconds."""

import copy
import dataclasses
import json
import os
import shutil
import threading
from pathlib import Path


import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function, sliding_window_overlay

import convert
import sea

VOCAB, SEQ = 64, 24

SHAPE = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=4, max_position_embeddings=SEQ, initializer_range=0.3, pad_token_id=0, bos_token_id=0, eos_token_id=1,
             num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
             hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
# SEA small enough for so few tokens that each of its choices is one: 2 of 11 bins at most, out of 4, beside the last and first keys.
SEA = dict(width=8, topk=9, bin=2, local=2, first=1, candidates=2)
OPT = dict(word_embed_proj_dim=16, ffn_dim=32, num_attention_heads=2, dropout=0.0, init_std=0.3)
IMAGE = dict(image_size=16, patch_size=8)

# A model of each family that SEA serves: its class, and what its config has beside SHAPE.
FAMILIES = {
    "opt": ("OPTForCausalLM", OPT),
    "opt-350m": ("OPTForCausalLM", {**OPT, "word_embed_proj_dim": 8, "do_layer_norm_before": False}),
    "gpt2": ("GPT2LMHeadModel", dict(num_attention_heads=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "llama": ("LlamaForCausalLM", {}),
    "bert": ("BertModel", {}),
    "mistral": ("MistralForCausalLM", dict(sliding_window=None)),
    "mixtral": ("MixtralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {}),
    "gemma": ("GemmaForCausalLM", {}),
    "gemma3, all layers full": ("Gemma3ForCausalLM", dict(layer_types=["full_attention"] * 2)),
    "granite-moe": ("GraniteMoeForCausalLM", {}),
    "gpt-neox": ("GPTNeoXForCausalLM", dict(hidden_dropout=0.0)),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "phi": ("PhiForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", dict(sliding_window=None)),
    "stablelm": ("StableLmForCausalLM", dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5))),
    "starcoder2": ("Starcoder2ForCausalLM", dict(sliding_window=None, residual_dropout=0.0, embedding_dropout=0.0)),
    "cohere": ("CohereForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "lfm2, with convolutions": ("Lfm2ForCausalLM", dict(layer_types=["conv", "full_attention"])),
    "lfm2-moe": ("Lfm2MoeForCausalLM", dict(layer_types=["full_attention"] * 2, moe_intermediate_size=16, num_experts=4,
                                            num_experts_per_tok=2, num_dense_layers=1)),
    "albert": ("AlbertModel", dict(embedding_size=16)),
    "roberta": ("RobertaModel", dict(max_position_embeddings=SEQ + 1)),
    "electra": ("ElectraModel", dict(embedding_size=16)),
    "distilbert": ("DistilBertModel", dict(hidden_dim=32, dropout=0.0, attention_dropout=0.0)),
    "esm": ("EsmModel", dict(position_embedding_type="rotary", token_dropout=False, mask_token_id=2)),
    "eurobert": ("EuroBertModel", {}),
}
MODELS = ("opt", "opt-350m", "gpt2", "llama", "bert")  # those that every law sees

# What SEA is no stand-in for, and what attach says of it.
OTHERS = {
    "MistralForCausalLM": (dict(sliding_window=4), "sliding windows"),
    "PhimoeForCausalLM": (dict(sliding_window=4), "sliding windows"),
    "Gemma2ForCausalLM": (dict(sliding_window=4), "sliding windows"),
    "Gemma2Model": (dict(layer_types=["full_attention"] * 2), "soft caps"),
    "ModernBertModel": (dict(local_attention=4), "sliding windows"),
    "Llama4ForCausalLM": (dict(intermediate_size_mlp=16), "chunked attention"),
    "GptOssForCausalLM": (dict(layer_types=["full_attention"] * 2), "attention sinks"),
    "DeepseekV3ForCausalLM": (dict(q_lora_rank=8, kv_lora_rank=8, n_routed_experts=4, n_group=1, topk_group=1),
                              "multi-head latent attention"),
    "DiffLlamaForCausalLM": ({}, "a difference of two attentions"),
    "BigBirdPegasusForCausalLM": (dict(d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16), "cross-attention"),
    "BartForCausalLM": (dict(d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16), "cross-attention"),
    "LayoutLMv3Model": (dict(has_relative_attention_bias=True, visual_embed=False, coordinate_size=2, shape_size=4), "a position bias"),
    "Wav2Vec2BertModel": (dict(feature_projection_input_dim=8), "a position bias"),
}


def build(name: str, fields: dict) -> torch.nn.Module:
    """A random model of a class of transformers; of SHAPE, what its config has."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    config = model_class.config_class
    names = {field.name for field in dataclasses.fields(config)} | config.attribute_map.keys()
    shape = {name: x for name, x in SHAPE.items() if name in names}
    model = model_class(config(**{**shape, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.std() < 0.2:  # so near 0 all attention would be the same
                parameter.normal_(0, 0.3)
    return model


def tiny(kind: str) -> torch.nn.Module:
    return build(*FAMILIES[kind])


def tokens(batch: int = 2, n: int = SEQ) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, n), generator=torch.Generator().manual_seed(1))


def keep_every_key(model: torch.nn.Module, **options) -> torch.nn.Module:
    """Attach SEA that is the model's own attention: all keys kept, and gates open."""
    convert.attach(model, **{**SEA, "topk": 2 * SEQ, **options})
    with torch.no_grad():
        for module in convert.attention_modules(model):
            module.sea.gate.bias.fill_(60.0)
    return model


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_full_mask_and_open_gates_is_the_model_itself(kind):
    """Scale, heads, causality and padding reach SEA as they reach SDPA."""
    model, x, cases = tiny(kind), tokens(), {}
    for padding in ("none", "left", "right"):
        mask = torch.ones_like(x)
        if padding != "none":
            mask[0, :7] = 0
            mask = mask.flip(1) if padding == "right" else mask
        cases[padding] = dict(attention_mask=mask)
        if kind.startswith("gpt"):  # some count learned positions from the first column, padding or not
            cases[padding]["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if kind == "lfm2, with convolutions":
        del cases["left"]  # these see padding
    expected = {name: model(x, **case)[0] for name, case in cases.items()}
    keep_every_key(model)
    for bin in (2, 0):  # some, and no bins
        if bin == 0:
            convert.set_option(model, bin=0)
        for name, case in cases.items():
            valid = case["attention_mask"].bool()
            torch.testing.assert_close(model(x, **case)[0][valid], expected[name][valid], rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_other_attention_is_refused_and_the_model_stays_as_it_was(name):
    fields, what = OTHERS[name]
    model = build(name, fields)
    before, implementation = model.state_dict().keys(), model.config._attn_implementation
    with pytest.raises(ValueError, match=f"^model: expected (plain self-attention, got {what} in|self-attention modules)"):
        convert.attach(model, width=8)
    assert model.state_dict().keys() == before and model.config._attn_implementation == implementation
    assert not hasattr(model.config, "sea")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("what, change", [
    ("attention sinks", lambda module, config: setattr(module, "attention_sink_bias", torch.zeros(4))),
    ("a choice of keys", lambda module, config: setattr(module, "indexer", torch.nn.Identity())),
    ("multi-head latent attention", lambda module, config: setattr(config, "kv_lora_rank", 8)),
    ("sliding windows", lambda module, config: setattr(module, "sliding_window", 4)),
    ("sliding windows", lambda module, config: setattr(config, "sliding_window", 4)),
    ("sliding attention", lambda module, config: setattr(config, "layer_types", ["full_attention", "sliding_attention"])),
    ("no weights, or quantized ones,", lambda module, config: [
        setattr(layer, "weight", torch.nn.Parameter(layer.weight.char(), requires_grad=False)) for layer in module.children()])])
def test_one_layer_that_does_more_is_refused(what, change):
    """Also where no family that is tried here does."""
    model = tiny("llama")
    change(convert.attention_modules(model)[1], model.config)
    with refused(f"model: expected plain self-attention, got {what} in LlamaAttention"):
        convert.attach(model, width=8)


def test_windows_that_a_config_does_not_use_are_none():
    model = tiny("llama")
    model.config.sliding_window, model.config.use_sliding_window = 4, False
    assert convert.attention_modules(convert.attach(model, width=8))[0].sea


def test_what_a_module_says_of_its_shape_goes_before_its_config():
    model = tiny("llama")
    model.config.num_key_value_heads = 1
    assert convert.attention_modules(convert.attach(model, width=8))[0].sea.config.n_kv_head == 2
    model = tiny("llama")
    vars(model.config)["max_position_embeddings"] = None  # a Llama's own setter wants a number
    with refused("max_positions: expected the number of tokens of the longest sequence, since LlamaConfig does not tell it"):
        convert.attach(model, width=8)
    assert convert.attention_modules(convert.attach(model, width=8, max_positions=9))[0].sea.config.max_positions == 9


def test_a_model_whose_attention_is_its_own_keeps_it(monkeypatch):
    """One that ignores the switch, one that says it cannot run what the interface has, and one of which a layer stays behind."""
    falcon, opt, llama = build("FalconForCausalLM", {}), tiny("opt"), tiny("llama")
    last = convert.attention_modules(llama)[1]
    last.config = copy.deepcopy(last.config)
    monkeypatch.setattr(transformers.OPTPreTrainedModel, "_supports_sdpa", False)
    monkeypatch.setattr(transformers.OPTPreTrainedModel, "_supports_flash_attn", False)
    for model in (falcon, opt, llama):
        before = model.config._attn_implementation
        with refused("model: expected one whose attention goes through transformers' interface"):
            convert.attach(model, width=8)
        assert model.config._attn_implementation == before != "sea"


def image_and_text(name: str, text: str) -> tuple[torch.nn.Module, dict]:
    """A random model of images and text, and an image of 4 tokens with 8 of text behind it."""
    text = dict(model_type=text, **{**SHAPE, "vocab_size": 2 * VOCAB, "layer_types": ["full_attention"] * 2})
    vision = dict(model_type="clip_vision_model" if name.startswith("Llava") else "siglip_vision_model", hidden_size=16,
                  intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=16, **IMAGE)
    config = dict(text_config=text, vision_config=vision, image_token_index=VOCAB, projection_dim=16, mm_tokens_per_image=4,
                  vision_feature_layer=-1)
    x = torch.cat([torch.full((1, 4), VOCAB), tokens(1, 8)], dim=1)
    is_image = (x == VOCAB).long()
    inputs = dict(input_ids=x, pixel_values=torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)))
    if not name.startswith("Llava"):
        inputs["token_type_ids"] = 1 - is_image if name.startswith("Pali") else is_image
    return build(name, config), inputs


@torch.no_grad()
def test_images_and_text_have_layers_of_their_own_shapes():
    """2 heads of the image's encoder; 4 of the text's over 2, causal."""
    model, inputs = image_and_text("LlavaForConditionalGeneration", "llama")
    expected = model(**inputs).logits
    torch.testing.assert_close(keep_every_key(model)(**inputs).logits, expected, rtol=1e-4, atol=3e-4)


@torch.no_grad()
def test_only_causal_layers_need_to_know_the_longest_sequence(monkeypatch):
    model = build("ViTModel", IMAGE)  # its config has no positions
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    expected = model(image)[0]
    torch.testing.assert_close(keep_every_key(model)(image)[0], expected, rtol=1e-4, atol=3e-4)
    model = tiny("llama")
    del model.config.max_position_embeddings
    monkeypatch.delattr(type(model.config), "max_position_embeddings")  # its default
    with refused("max_positions: expected the number of tokens of the longest sequence, since LlamaConfig does not tell it"):
        convert.attach(model, width=8)
    convert.attach(model, width=8, max_positions=SEQ)(tokens())


def test_a_student_has_shapes_without_memory():
    model = convert.attach(tiny("llama").to("meta"), **SEA)
    assert model(tokens().to("meta")).logits.shape == (2, SEQ, VOCAB)


def test_a_number_of_heads_has_to_be_told():
    model = tiny("bert")
    for module in convert.attention_modules(model):
        del module.num_attention_heads
        module.config = transformers.PreTrainedConfig()
    with refused("model: expected a number of heads in PreTrainedConfig or BertSelfAttention, got none"):
        convert.attach(model, width=8)


def test_quantized_weights_are_refused():
    model = tiny("llama")
    for linear in model.modules():
        if isinstance(linear, torch.nn.Linear):
            linear.weight = torch.nn.Parameter(linear.weight.to(torch.uint8), requires_grad=False)
    with refused("model: expected plain self-attention, got no weights, or quantized ones, in LlamaAttention"):
        convert.attach(model, width=8)


def refused(message: str):
    return pytest.raises(ValueError, match=f"^{message}")


@torch.no_grad()
def test_a_mask_of_another_kind_is_refused():
    """Where only the call can tell: prefixes and images that see all of themselves, and masks of one's own."""
    for name, text in ("PaliGemmaForConditionalGeneration", "gemma"), ("Gemma3ForConditionalGeneration", "gemma3_text"):
        model, inputs = image_and_text(name, text)
        with refused("attention_mask: expected a causal or bidirectional mask, .* got another"):
            keep_every_key(model)(**inputs)
    with refused(r"attention_mask: expected a causal or bidirectional mask, .* got one of shape \(2, 1, 24, 24\)"):
        keep_every_key(tiny("llama"))(tokens(), attention_mask=torch.ones(2, 1, SEQ, SEQ, dtype=torch.bool))
    for keyword in (dict(position_bias=torch.zeros(1, 4, SEQ, SEQ)), dict(softcap=3.0), dict(cu_seq_lens_q=torch.tensor([0, 5, SEQ]))):
        with refused(f"{next(iter(keyword))}: expected None, SEA has no such attention, got "):
            keep_every_key(tiny("llama"))(tokens(), **keyword)


def test_a_mask_is_of_all_the_kinds_that_it_intersects():
    """Their order is the model's."""
    packed, window = (f(x) for f, x in ((packed_sequence_mask_function, torch.zeros(1, 4)), (sliding_window_overlay, 3)))
    for other, shape in (packed, (0, 0, 0)), (window, (0, 0, 0, 0)):
        for parts in (causal_mask_function, other), (other, causal_mask_function), (causal_mask_function, and_masks(other)):
            assert convert.sea_mask(mask_function=and_masks(*parts)).shape == shape


@torch.no_grad()
def test_causality_is_the_configs_and_the_calls():
    """A decoder may be made bidirectional before SEA is attached; after it, or for one call, is refused."""
    model, x = tiny("llama"), tokens()
    causal = model(x).logits
    model.config.is_causal = False
    expected = model(x).logits
    assert not torch.allclose(causal, expected, atol=0.1)
    torch.testing.assert_close(keep_every_key(model)(x).logits, expected, rtol=1e-4, atol=3e-4)
    model = keep_every_key(tiny("llama"))
    with refused("is_causal: expected True, as SEA was attached to LlamaAttention, got False"):
        model(x, is_causal=False)
    model.config.is_causal = False
    with refused("is_causal: expected True, as SEA was attached to LlamaAttention, got False"):
        model(x)
    for name in ("CLIPTextModel", "OwlViTTextModel"):  # their calls alone say that they are causal
        model = build(name, {})
        expected = model(x)[0]
        with refused("is_causal: expected False, .* got True; attach.model, causal=.... decides"):
            keep_every_key(build(name, {}))(x)
        torch.testing.assert_close(keep_every_key(model, causal=True)(x)[0], expected, rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("kind", ["llama", "opt"])
@torch.no_grad()
def test_a_mask_of_any_numbers_and_with_holes_is_the_models_own(kind):
    """Columns are counted, from the first token on: a hole has positions, and 2 is as good as 1."""
    model, x = tiny(kind), tokens()
    if kind == "opt":  # its positions are sums of the mask
        numbers = torch.ones_like(x)
    else:
        numbers = torch.arange(SEQ).expand(2, -1) // 5 + 1
    mask = numbers * (torch.arange(SEQ) // 4 != 2)
    expected = model(x, attention_mask=mask)[0]
    out = keep_every_key(model)(x, attention_mask=mask)[0]
    torch.testing.assert_close(out[mask != 0], expected[mask != 0], rtol=1e-4, atol=3e-4)


@torch.no_grad()
def test_padding_of_the_past_stays_what_it_was():
    model, x = convert.attach(tiny("llama"), **SEA), tokens()
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    other = mask.flip(0)
    for first, second in ((mask, None), (None, mask), (mask, other)):
        begun = model(x[:, :15], attention_mask=None if first is None else first[:, :15]).past_key_values
        with refused("attention_mask: expected the padding of the tokens before as it was in their call, got another"):
            model(x[:, 15:], attention_mask=second, past_key_values=begun)
    begun = model(x[:, :15]).past_key_values
    mask = torch.ones_like(x)
    mask[0, -2:] = 0  # padding that comes now is none of the past's
    torch.testing.assert_close(model(x[:, 15:], attention_mask=mask, past_key_values=begun).logits[1],
                               model(x).logits[1, 15:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "opt", "llama"])
@torch.no_grad()
def test_positions_of_ones_own_are_no_documents(kind):
    """Gaps, all the same, backwards: as the model's own attention, or refused where that takes them for documents."""
    x, own = tokens(n=8), [torch.arange(8) * 2, torch.zeros(8, dtype=torch.long), torch.arange(8).flip(0)]
    for position in own:
        model = tiny(kind)
        expected = model(x, position_ids=position[None])[0]
        torch.testing.assert_close(keep_every_key(model)(x, position_ids=position[None])[0], expected, rtol=1e-4, atol=3e-4)
    if kind == "llama":
        with refused("attention_mask: expected a causal or bidirectional mask, .* got another"):
            model(x, position_ids=own[0][None], use_cache=False)


DOCUMENTS = (3, 1, 12, 8)  # tokens


@pytest.mark.parametrize("kind", ["opt", "llama", "qwen2", "bert"])
@pytest.mark.parametrize("method", ["sea", "performer", "window", "reformer"])
def test_packed_documents_are_each_alone(kind, method):
    """Positions that begin again are documents, which see nothing of each other, forward and backward."""
    if method == "window" and kind == "bert":
        pytest.skip("a window is causal")
    model = convert.attach(tiny(kind).double(), method, **SEA)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x = tokens()
    position = torch.cat([torch.arange(n) for n in DOCUMENTS]).expand(2, -1)
    weight = torch.randn(SEQ, 1, generator=torch.Generator().manual_seed(3))
    packed = model(x, position_ids=position)[0]
    alone = torch.cat([model(part, use_cache=False)[0] for part in x.split(DOCUMENTS, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(packed, model(x)[0], atol=1e-2)
    embeds = model.get_input_embeddings()(x)
    for call in (dict(input_ids=x, position_ids=position[:1]), dict(inputs_embeds=embeds, position_ids=position)):
        assert torch.equal(model(**call)[0], packed)
    for out in (packed, alone):
        model.zero_grad()
        (out * weight).sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        if out is packed:
            of_packed = gradients
    for mine, expected in zip(of_packed, gradients, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def test_packed_documents_have_no_cache_weights_or_records():
    model, x = keep_every_key(tiny("llama")), tokens()
    position = torch.cat([torch.arange(n) for n in DOCUMENTS]).expand(2, -1)
    assert model(x, position_ids=position).past_key_values is None
    with refused("position_ids: expected no packed documents .* with past_key_values"):
        model(x, position_ids=position, past_key_values=transformers.DynamicCache())
    with refused("attention_mask: expected None with packed documents"):
        model(x, position_ids=position, attention_mask=torch.ones_like(x))
    with refused("position_ids: expected one document a sequence, since weights or records are wanted"):
        model(x, position_ids=position, output_attentions=True)
    with convert.record(model), refused("position_ids: expected one document a sequence, since weights or records are wanted"):
        model(x, position_ids=position)
    with refused("attention_mask: expected a causal or bidirectional mask, .* got another"):  # sea_mask alone hears of them
        model(x, position_ids=position, sea_documents=None, use_cache=False)
    lengths = torch.tensor([0, *DOCUMENTS]).cumsum(0)  # as DataCollatorWithFlattening gives them beside the positions
    given = model(x, position_ids=position, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=12, max_length_k=12)
    assert torch.equal(given.logits, model(x, position_ids=position).logits)
    one = dict(cu_seq_lens_q=torch.tensor([0, SEQ]), cu_seq_lens_k=torch.tensor([0, SEQ]), max_length_q=SEQ, max_length_k=SEQ)
    alone = model(x[:1], position_ids=torch.arange(SEQ)[None], **one)
    assert torch.equal(alone.logits, model(x[:1]).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt-neox", "opt"])
@torch.no_grad()
def test_left_padding_changes_nothing(kind):
    """Dense rotary attention sees differences of positions only, SEA's features where a token stands: positions are counted from
    the first token, also where the caller gives none, with a cache too."""
    model = convert.attach(tiny(kind), **SEA, query_stride=2)
    x, n = tokens(), 7
    mask = torch.ones_like(x)
    mask[:, :n] = 0
    alone = model(x[:, n:]).logits
    torch.testing.assert_close(model(x, attention_mask=mask).logits[:, n:], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x, mask).logits[:, n:], alone, rtol=1e-4, atol=1e-4)
    embeds = model.get_input_embeddings()(x)
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits[:, n:], alone, rtol=1e-4, atol=1e-4)
    begun = model(x[:, :15], attention_mask=mask[:, :15])
    rest = model(x[:, 15:], attention_mask=mask, past_key_values=begun.past_key_values)
    torch.testing.assert_close(rest.logits, alone[:, 15 - n :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_left_padding_changes_what_it_changes_with_dense_attention(kind):
    """Nothing, but where positions, which the caller does not give, are columns and learned."""
    model, x, n = tiny(kind), tokens(), 7
    mask = torch.ones_like(x)
    mask[:, :n] = 0

    def change():
        return (model(x, attention_mask=mask)[0][:, n:] - model(x[:, n:])[0]).abs().max()

    learned = kind in ("gpt2", "gpt-bigcode", "bert", "albert", "roberta", "electra", "distilbert")
    assert (change() > 0.1) == learned
    convert.attach(model, **SEA if type(model).__name__.endswith(("LM", "LMHeadModel")) else dict(topk=4, width=8))
    assert (change() > 0.1) == learned and (learned or change() < 1e-4)


@torch.no_grad()
def test_a_batch_goes_on_without_its_padded_sequences():
    model, x = convert.attach(tiny("llama"), **SEA), tokens()
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    cache = model(x[:, :-1], attention_mask=mask[:, :-1]).past_key_values
    cache.batch_select_indices(torch.tensor([1]))
    for given in (mask[1:], None):
        step = model(x[1:, -1:], attention_mask=given, past_key_values=copy.deepcopy(cache)).logits
        torch.testing.assert_close(step, model(x[1:]).logits[:, -1:], rtol=1e-4, atol=1e-4)


def test_each_weight_is_loaded_in_the_precision_that_it_was_saved_in(tmp_path):
    model = convert.attach(tiny("llama").bfloat16(), width=8)
    for module in convert.attention_modules(model):
        module.sea.float()
    convert.save(model, tmp_path / "student")
    assert {name: x.dtype for name, x in convert.load(tmp_path / "student").named_parameters()} == {
        name: x.dtype for name, x in model.named_parameters()}
    assert all(x.dtype == torch.float64 for x in convert.load(tmp_path / "student", torch.float64).parameters())
    weights = load_file(tmp_path / "student" / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(16, dtype=torch.int64)  # which no weight can be
    save_file(weights, tmp_path / "student" / "model.safetensors", metadata={"format": "pt"})
    assert convert.load(tmp_path / "student").model.norm.weight.dtype == torch.bfloat16


def test_loading_in_half_precision_keeps_rotary_frequencies(tmp_path):
    """As from_pretrained does: in bf16 they would be a radian off at far positions."""
    model = convert.attach(tiny("llama"), width=8)
    convert.save(model, tmp_path / "student")
    loaded = convert.load(tmp_path / "student", torch.bfloat16)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert loaded.lm_head.weight.dtype == torch.bfloat16 and loaded(tokens()).logits.isfinite().all()


def test_load_refuses_what_is_not_a_whole_student(tmp_path):
    with pytest.raises(ValueError, match="^folder: expected a model saved by convert.save, got .*nowhere"):
        convert.load(tmp_path / "nowhere")
    tiny("opt").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="^folder: expected a model with SEA, got a plain opt"):
        convert.load(tmp_path / "plain")
    convert.save(convert.attach(tiny("opt"), width=8), tmp_path / "student")
    tiny("opt").save_pretrained(tmp_path / "weights")
    (tmp_path / "weights/model.safetensors").rename(tmp_path / "student/model.safetensors")
    with pytest.raises(ValueError, match="^folder: expected all weights, got none for .*sea"):
        convert.load(tmp_path / "student")
    convert.save(convert.attach(tiny("opt"), width=8), tmp_path / "student")
    weights, config = load_file(tmp_path / "student/model.safetensors"), json.loads((tmp_path / "student/config.json").read_text())
    lost = next(name for name in weights if name.endswith("sea.gate.bias"))
    save_file({name: x for name, x in weights.items() if name != lost}, tmp_path / "student/model.safetensors", dict(format="pt"))
    with refused(f"folder: expected all weights, got none for .*{lost}"):
        convert.load(tmp_path / "student")
    save_file(weights, tmp_path / "student/model.safetensors", dict(format="pt"))
    for name in ("topk", "group", "query_stride", "bin", "local", "first", "candidates"):
        less = {**config, "sea": {key: x for key, x in config["sea"].items() if key != name}}
        (tmp_path / "student/config.json").write_text(json.dumps(less))
        with refused(f"folder: expected the config.json of a student .*sea: expected {name} in it"):
            convert.load(tmp_path / "student")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(ValueError, match="^folder: expected a new folder, or one of a saved model and nothing else"):
        convert.save(tiny("opt"), tmp_path / "mine")
    assert (tmp_path / "mine/thesis.tex").exists()


def test_what_sea_cannot_serve_is_refused():
    model, x = tiny("opt"), tokens()
    model.set_attn_implementation("sea")
    with pytest.raises(ValueError, match="^model: expected SEA attached"):
        model(x)
    convert.attach(model, width=8)
    with pytest.raises(ValueError, match="^past_key_values: expected a DynamicCache that is empty .* got a StaticLayer"):
        model.generate(x[:, :4], max_new_tokens=3, cache_implementation="static")
    full = transformers.DynamicCache()
    full.update(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8), 0)
    with pytest.raises(ValueError, match="^past_key_values: expected .* that this model has filled, got a DynamicLayer of 3 tokens"):
        model(x[:, :4], past_key_values=full)
    with refused("past_key_values: expected a transformers DynamicCache, got EncoderDecoderCache"):
        model(x[:, :4], past_key_values=transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache()))
    convert.attention_modules(model)[0].layer_idx = None
    with refused("past_key_values: expected none, since OPTAttention has no layer_idx; pass use_cache=False"):
        model(x[:, :4], use_cache=True)
    with pytest.raises(ValueError, match="^model: expected self-attention modules"):
        convert.attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="^model: expected plain self-attention, got an encoder and decoder in BartAttention"):
        convert.attach(build("BartForConditionalGeneration", dict(d_model=16, encoder_layers=1, decoder_layers=1,
                                                                  encoder_attention_heads=2, decoder_attention_heads=2)))
    with pytest.raises(ValueError, match="^model: expected one whose attention goes through transformers' interface, got Falcon"):
        convert.attach(build("FalconForCausalLM", {}))
    with pytest.raises(ValueError, match="^method: expected one of .*'performer'.*, got 'flash'"):
        convert.attach(tiny("opt"), method="flash")
    with pytest.raises(ValueError, match="^query_stride: expected 1 for a Performer, got 3"):
        convert.attach(tiny("opt"), method="performer", query_stride=3)
    with refused("model: expected a student, got a plain OPTForCausalLM"):
        convert.set_option(tiny("opt"), topk=3)
    for kind, bin in ("bert", 4), ("opt", 0):
        with refused(f"bin: expected >= 1, and a causal layer, for a window, got {bin}$"):
            convert.attach(tiny(kind), "window", bin=bin)


def recomputed(model, x, mask, steps: int) -> torch.Tensor:
    """Greedy tokens, each from a forward pass over the whole sequence."""
    for _ in range(steps):
        position = (mask.cumsum(1) - 1).clamp(min=0)  # as generate() counts
        x = torch.cat([x, model(x, attention_mask=mask, position_ids=position, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask[:, :1] | True], 1)
    return x


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("options", [dict(), dict(query_stride=3, cell_keys=False), dict(query_stride=3, bin=0), dict(method="window"),
                                     dict(method="reformer")])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_generate_gives_the_tokens_of_full_recomputation(kind, options, padded, tmp_path):
    """Greedy, with transformers' cache, left-padded too, for a student saved and loaded; grouped-query and rotary included."""
    model = convert.attach(tiny(kind), **{**SEA, "width": 5, **options})
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    model.tie_weights()
    convert.save(model, tmp_path / "student")
    model, x = convert.load(tmp_path / "student"), tokens(n=7)
    mask = torch.ones_like(x)
    if padded:
        mask[0, :4] = 0
    for how in (dict(use_cache=True), dict(use_cache=False), dict(prefill_chunk_size=3)):
        model.generation_config.eos_token_id = None
        out = model.generate(x, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=1, **how)
        assert torch.equal(out, recomputed(model, x, mask.bool(), 9)), options


@pytest.mark.parametrize("kind, bin, cnn", [("opt", 2, True), ("llama", 0, True), ("llama", 2, False)])
@torch.no_grad()
def test_a_student_is_its_model_up_to_dense_below(kind, bin, cnn, tmp_path):
    """Logits and tokens of the plain model, padded, too; then one whose queries begin to choose while it generates."""
    plain, x = tiny(kind), tokens(n=7)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    call = dict(attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=1)
    model = convert.attach(tiny(kind), **{**SEA, "bin": bin}, cnn=cnn, dense_below=SEQ + 1)
    # a rotary student counts positions from the first token
    position = (mask.cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(model(x, attention_mask=mask).logits[mask.bool()],
                               plain(x, attention_mask=mask, position_ids=position).logits[mask.bool()])
    for m in (plain, model):
        m.generation_config.eos_token_id = None
    assert torch.equal(model.generate(x, **call), plain.generate(x, **call))
    convert.set_option(model, dense_below=10)
    convert.save(model, tmp_path / "student")
    model = convert.load(tmp_path / "student")
    assert all(m.sea.config.dense_below == 10 for m in convert.attention_modules(model))
    model.generation_config.eos_token_id = None
    assert torch.equal(model.generate(x, **call), recomputed(model, x, mask.bool(), 9))


@torch.no_grad()
def test_a_call_of_dense_queries_alone_estimates_nothing(monkeypatch):
    """Where no cache asks for a state: the same logits, and those of one query more come from SEA."""
    model, x = convert.attach(tiny("llama"), **SEA, dense_below=7), tokens(n=7)
    cached = model(x[:, :6], use_cache=True).logits

    def estimate(*args, **options):
        raise RuntimeError("estimates")

    monkeypatch.setattr(sea.SEAttention, "forward", estimate)
    assert torch.equal(model(x[:, :6], use_cache=False).logits, cached)
    for call in dict(use_cache=True), dict(use_cache=False, attention_mask=x[:, :6] * 0 + torch.arange(6).clamp(max=1)):
        with pytest.raises(RuntimeError, match="estimates"):
            model(x[:, :6], **call)
    with pytest.raises(RuntimeError, match="estimates"):
        model(x, use_cache=False)


@torch.no_grad()
def test_a_call_of_dense_queries_alone_is_refused_as_any_other():
    short = convert.attach(tiny("llama"), **SEA, dense_below=7, max_positions=5)
    with pytest.raises(ValueError, match="k: expected at most max_positions = 5 tokens, padding included, got 6"):
        short(tokens(n=6), use_cache=False)


@pytest.mark.parametrize("kind, bin", [("opt", 2), ("llama", 2), ("llama", 0)])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@torch.no_grad()
def test_a_long_prefill_in_chunks_is_the_same(kind, bin, padding, monkeypatch):
    model, x = convert.attach(tiny(kind), **{**SEA, "bin": bin}, query_stride=2), tokens(n=16)
    mask = torch.ones_like(x)
    mask[0, {"none": slice(0), "left": slice(5), "right": slice(-5, None)}[padding]] = 0
    calls, results, estimate = [], [], sea.SEAttention.estimate_attention
    monkeypatch.setattr(sea.SEAttention, "estimate_attention",
                        lambda self, ops, q, *rest: calls.append(q.shape[2]) or estimate(self, ops, q, *rest))
    for rows in (convert.ROWS_AT_ONCE, 5):
        monkeypatch.setattr(convert, "ROWS_AT_ONCE", rows)
        calls.clear()
        logits = model(x, attention_mask=mask).logits
        assert calls == ([16, 16] if rows > 16 else [4] * 8)  # chunks are whole estimated rows
        tokens_ = model.generate(x, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=1)
        results.append((logits, tokens_))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    assert torch.equal(results[1][1], results[0][1])
    with convert.record(model) as records:  # who looks inside gets the scores
        model(x, attention_mask=mask)
    assert all(r.sea.scores is not None for r in records)


@torch.no_grad()
def test_a_window_is_the_first_and_the_last_keys_alone(monkeypatch):
    """Of 11, 4 are the first 2 bins; the last are 6 or, to the end of a bin, 7. Dense attention under that mask is the same model; and
    so it is in chunks."""
    model, dense, x = convert.attach(tiny("llama"), "window", topk=11, bin=2, first=3), tiny("llama"), tokens()
    i, j = torch.arange(SEQ)[:, None], torch.arange(SEQ)
    n_last = 11 - 4 - 1  # on average half a bin more
    window = (j <= i) & ((j < 4) | (j >= (i + 1 - n_last) // 2 * 2))
    expected = dense(x, attention_mask=window.expand(2, 1, -1, -1)).logits
    for rows in (convert.ROWS_AT_ONCE, 5):
        monkeypatch.setattr(convert, "ROWS_AT_ONCE", rows)
        torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("student", [dict(query_stride=2), dict(query_stride=2, bin=0), dict(method="window"), dict(method="reformer")])
@pytest.mark.parametrize("options", [dict(num_beams=3), dict(num_beams=2, num_return_sequences=2), dict(do_sample=True, top_k=5),
                                     dict(do_sample=True, num_return_sequences=3)])
@torch.no_grad()
def test_beams_and_samples_are_the_same_with_and_without_a_cache(options, student):
    """The state follows reordering and expansion of the batch."""
    model, x = convert.attach(tiny("opt"), **{**SEA, **student}), tokens(n=6)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(model.generate(x, max_new_tokens=8, min_new_tokens=8, use_cache=use_cache, pad_token_id=1, **options))
    assert torch.equal(*results)


@torch.no_grad()
def test_the_state_in_the_cache_is_constant_in_size():
    model = convert.attach(tiny("llama"), **SEA)
    sizes = []
    for n in (5, SEQ):
        cache = model(tokens(n=n), use_cache=True).past_key_values
        states = [vars(layer.state).values() for layer in cache.layers]
        flat = [x for state in states for value in state for x in (value if isinstance(value, tuple) else (value,))]
        sizes.append(sum(x.numel() for x in flat if isinstance(x, torch.Tensor)))
    assert sizes[0] == sizes[1]
    cache.reset()
    assert all(layer.state is None for layer in cache.layers)
    with pytest.raises(ValueError, match="^past_key_values: expected no crop"):
        cache.crop(-2)


@pytest.mark.parametrize("kind, options", [
    *((kind, {}) for kind in MODELS), ("opt", dict(bin=0)), ("llama", dict(query_stride=3)),
    *((kind, dict(method=method)) for kind, method in (("llama", "window"), ("llama", "reformer"), ("bert", "reformer")))])
@torch.no_grad()
def test_output_attentions_gives_the_sparse_attention(kind, options, monkeypatch):
    """As users of transformers expect it: a (B, H, T, T) tensor a layer, over the positions of a padded batch."""
    model, x = convert.attach(tiny(kind), **{**SEA, **options}), tokens()
    mask = torch.ones_like(x)
    mask[0, :7] = 0
    with convert.record(model) as records:
        attentions = model(x, attention_mask=mask, output_attentions=True).attentions
    assert len(attentions) == len(records)
    for weights, r in zip(attentions, records):
        v = sea.repeat_heads(r.v, r.q.shape[1])
        assert weights.shape == (2, r.q.shape[1], SEQ, SEQ)
        total = weights.sum(-1)
        torch.testing.assert_close(total, (total > 0.5).float())  # a head may keep no cell of a query
        assert total.any() and not total[0, :, :7].any() and not weights[0, :, :, :7].any()
        seen, *qkv = r.sea.seen[1:], r.q[1:], r.k[1:], r.v[1:]
        if r.sea.bins is None:
            sparse = sea.sparse_attention(*qkv, r.sea.cells[1:], seen, r.scale, row=r.sea.row[1:])
        else:
            sparse = sea.bin_attention(*qkv, r.sea.bins[1:], seen, r.scale, bin=r.sea.bin)
        torch.testing.assert_close(weights[1:] @ v[1:], sparse, rtol=1e-4, atol=1e-5)
        if kind != "bert":
            n_attended = r.sea.n_attended()[1:]
            assert torch.equal((weights[1:] > 0).sum(-1), n_attended.repeat_interleave(r.q.shape[1] // n_attended.shape[1], 1))
        order = (mask == 0).int().argsort(dim=1, stable=True)  # tokens of a sequence by rank
        ranked = weights.gather(-1, order[:, None, None].expand_as(weights))
        csr = convert.attention_csr(r.q, sea.take(r.k, order), r.sea, r.scale)
        torch.testing.assert_close(torch.stack([torch.stack([m.to_dense() for m in heads]) for heads in csr]), ranked,
                                   rtol=1e-4, atol=1e-6)
    assert not model(x).attentions  # nobody asked
    monkeypatch.setattr(convert, "MOST_WEIGHTS", 100)
    with pytest.raises(ValueError, match="^output_attentions: expected at most 100 numbers a layer, got .*attention_csr"):
        model(x, output_attentions=True)
    assert not any(m.sea_weights for m in convert.attention_modules(model)), "kept asking after a run that failed"


@pytest.mark.parametrize("method, options", [
    *(("sea", {name: value}) for name, value in dict(topk=20, bin=1, local=5, first=4, candidates=1, query_stride=2, group="query",
                                                   backend="torch").items()),
    ("sea", dict(bin=0)), ("sea", dict(bin=0, group="query")), ("sea without a CNN", dict(width=3, query_stride=2)), ("sea in cells", dict(bin=1)),
    ("window", dict(topk=20)), ("window", dict(topk=4)), ("window", dict(first=4)), ("reformer", dict(topk=20))])
@torch.no_grad()
def test_set_option_reaches_every_layer_and_survives_saving(method, options, tmp_path):
    """As if attached so, with the same parameters, the shares of heads among them where they count; the estimate does not change."""
    fixed = SEA | {"sea without a CNN": dict(cnn=False), "sea in cells": dict(bin=0)}.get(method, {})
    method = method.split()[0]
    model, x = convert.attach(tiny("llama"), method, **fixed), tokens()
    before = model(x).logits
    convert.set_option(model, **options)
    assert torch.equal(model(x).logits, before) == ("backend" in options)
    convert.save(model, tmp_path / "student")
    torch.manual_seed(0)
    again, attached = convert.load(tmp_path / "student"), convert.attach(tiny("llama"), method, **{**fixed, **options})
    attached.load_state_dict(model.state_dict())
    for other in (again, attached):
        assert torch.equal(other(x).logits, model(x).logits)
        assert {name for name, _ in other.named_parameters()} == {name for name, _ in model.named_parameters()}
        assert [m.sea.config for m in convert.attention_modules(other)] == [m.sea.config for m in convert.attention_modules(model)]
    assert again.config.sea == attached.config.sea == model.config.sea


def test_controls_take_any_number_of_keys_that_they_can_have(tmp_path):
    """The last keys of a window are what is left of topk, a Performer has none to choose, and a Reformer's chunks have one at least."""
    for method, topk in ("window", 4), ("performer", 1), ("reformer", 1):
        model = moved(convert.attach(tiny("llama"), method, topk=topk))
        convert.save(model, tmp_path / method)
        assert_same(convert.load(tmp_path / method), model)
    with refused("topk: expected at least 4, since on average as many first and last keys are always attended to, got 3"):
        convert.attach(tiny("llama"), "window", topk=3)


@pytest.mark.parametrize("method, options, message", [
    ("sea", dict(width=9), "options: expected some of topk, group, bin, local, first, candidates, query_stride, dense_below, backend, got width, which the weights depend on"),
    ("sea", dict(topk=4), "topk: expected at least 5, since on average as many first and last keys are always attended to, got 4"),
    ("sea", dict(local=9), "topk: expected at least 12, since on average as many first and last keys are always attended to, got 9"),
    ("sea", dict(local=0), "local: expected an integer >= 1, with bins, got 0"),
    ("sea", dict(bin=-1), "bin: expected an integer >= 0, got -1"),
    ("sea", dict(bin=0, group="kv"), "bin: expected bins for group kv, got 0"),
    ("sea", dict(first=True), "first: expected an integer >= 0, got True"),
    ("sea", dict(candidates=0), "candidates: expected an integer >= 1, got 0"),
    ("sea", dict(group="head"), "group: expected one of .* when causal, .* got 'head'"),
    ("window", dict(bin=0, group="query"), "bin: expected >= 1, and a causal layer, for a window, got 0"),
    ("window", dict(topk=3), "topk: expected at least 4, since on average as many first and last keys are always attended to, got 3")])
@torch.no_grad()
def test_options_that_no_layer_can_have_are_refused_and_the_model_stays_as_it_was(method, options, message):
    """Also where only a later layer refuses: an image's layers are not causal, those of its text are."""
    model, x = convert.attach(tiny("llama"), method, **SEA), tokens()
    before, config = model(x).logits, model.config.sea
    with refused(message + "$"):
        convert.set_option(model, **options)
    assert model.config.sea == config and torch.equal(model(x).logits, before)


@torch.no_grad()
def test_layers_of_two_kinds_have_options_of_their_own(tmp_path):
    """A causal text's have bins, an image's cells, also after saving; a choice for one that the other cannot make leaves both."""
    model, inputs = image_and_text("LlavaForConditionalGeneration", "llama")
    model, (image, *_, text) = moved(convert.attach(model, **SEA)), convert.attention_modules(model)
    assert (image.sea.config.group, text.sea.config.group) == ("causal_batch", "kv")
    convert.save(model, tmp_path / "student")
    assert torch.equal(convert.load(tmp_path / "student")(**inputs).logits, model(**inputs).logits)
    with refused("topk: expected at least 5"):
        convert.set_option(model, topk=2)
    assert image.sea.config.topk == text.sea.config.topk == 9


# What a student of tiny("opt") held before the controls left sea.py: its "sea" in config.json, and the weights of a layer's attention.
OPTIONS = {"width": 8, "topk": 3, "group": "causal_batch", "query_stride": 1, "nbf": 8, "cell_keys": True, "backend": "auto"}
WEIGHTS = {"performer": {"projection": (8, 2)}, "sea": {
    "cnn.conv1.bias": (4,), "cnn.conv1.weight": (4, 4, 3, 3), "cnn.conv2.bias": (4,), "cnn.conv2.weight": (4, 4, 3, 3),
    "cnn.norm.bias": (4,), "cnn.norm.weight": (4,), "cnn.norm_out.bias": (8,), "cnn.norm_out.weight": (8,), "cnn.up.bias": (8,),
    "cnn.up.weight": (8, 4, 1, 1), "decoder.bias": (8,), "decoder.weight": (8, 16), "encoder.0.bias": (16,), "encoder.0.weight": (16, 24),
    "encoder.1.bias": (16,), "encoder.1.weight": (16,), "gate.bias": (2,), "gate.weight": (2, 16), "key_gain": (2,), "position": (24, 8),
    "projection": (8, 2)}}


@pytest.mark.parametrize("method, logits", [
    ("sea", [[-0.798026, 0.498143, 0.286753], [-0.756176, 0.476889, 0.426240]]),
    ("performer", [[-0.734758, 0.498266, 0.367880], [-0.706631, 0.484677, 0.478492]])])
@torch.no_grad()
def test_students_saved_by_earlier_versions_load_and_say_the_same(method, logits, tmp_path):
    """The numbers are those that the version which wrote such folders gave."""
    config = tiny("opt").config
    config.sea, config.architectures = {**OPTIONS, "method": method}, ["OPTForCausalLM"]
    config.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    draw = lambda shapes: {name: 0.3 * torch.randn(shapes[name], generator=generator) for name in sorted(shapes)}
    state = draw({name: x.shape for name, x in tiny("opt").state_dict().items() if name != "lm_head.weight"})
    for i in range(2):
        state |= {f"model.decoder.layers.{i}.self_attn.sea.{name}": x for name, x in draw(WEIGHTS[method]).items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    model = convert.load(tmp_path)
    assert all(type(m.sea) is convert.METHODS[method] for m in convert.attention_modules(model))
    torch.testing.assert_close(model(tokens()).logits[:, -1, :3], torch.tensor(logits), rtol=1e-4, atol=1e-4)
    convert.save(model, tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again").sea
    assert {**again, **config.sea} == again and again["bin"] == 0  # its files tell no more than that


@pytest.mark.parametrize("kind", ["bert", "llava"])
@torch.no_grad()
def test_encoders_saved_before_they_had_cell_keys_load_and_say_the_same(kind, tmp_path):
    """Their config named cell keys that only causal layers had, and neither causality nor a group unless it was given."""
    inputs = dict(input_ids=tokens())
    model, inputs = image_and_text("LlavaForConditionalGeneration", "llama") if kind == "llava" else (tiny(kind), inputs)
    moved(convert.attach(model, **SEA, nbf=8, group=None))
    late = [m.sea for m in convert.attention_modules(model) if not m.sea.config.causal]
    for layer in late:  # as they were computed then
        layer.config = dataclasses.replace(layer.config, cell_keys=False)
    expected = model(**inputs)[0]
    convert.save(model, tmp_path / "old")
    weights, config = load_file(tmp_path / "old/model.safetensors"), json.loads((tmp_path / "old/config.json").read_text())
    config["sea"].pop("causal", None)
    assert config["sea"]["cell_keys"]
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    gains = [f"{name}.key_gain" for name, x in model.named_modules() if x in late]
    old = {name: x for name, x in weights.items() if name not in gains}
    save_file(old, tmp_path / "old/model.safetensors", {"format": "pt"})
    loaded = convert.load(tmp_path / "old")
    assert torch.equal(loaded(**inputs)[0], expected)
    assert {m.sea.config.group for m in convert.attention_modules(loaded)} <= {"causal_batch", "kv"}
    convert.save(loaded, tmp_path / "again")
    assert torch.equal(convert.load(tmp_path / "again")(**inputs)[0], expected)
    if len(gains) > 1:  # but half of them are no student of any time
        save_file(old | {gains[0]: weights[gains[0]]}, tmp_path / "old/model.safetensors", {"format": "pt"})
        with refused("folder: expected all weights, got none for .*key_gain"):
            convert.load(tmp_path / "old")


def test_causal_layers_without_their_cell_keys_are_refused(tmp_path):
    convert.save(convert.attach(tiny("llama"), **SEA), tmp_path / "student")
    weights = load_file(tmp_path / "student/model.safetensors")
    save_file({name: x for name, x in weights.items() if "key_gain" not in name}, tmp_path / "student/model.safetensors", {"format": "pt"})
    with refused("folder: expected all weights, got none for .*key_gain"):
        convert.load(tmp_path / "student")


@torch.no_grad()
def test_heads_of_students_from_before_they_had_shares_count_alike(tmp_path):
    model = convert.attach(tiny("llama"), **SEA)
    expected = model(tokens()).logits
    convert.save(model, tmp_path / "student")
    weights = load_file(tmp_path / "student/model.safetensors")
    shares = [name for name in weights if "head_share" in name]
    for lost, message in ((shares, None), (shares[:1], "folder: expected all weights, got none for .*head_share")):
        old = {name: x for name, x in weights.items() if name not in lost}
        save_file(old, tmp_path / "student/model.safetensors", {"format": "pt"})
        if message is None:
            assert len(shares) == 2 and torch.equal(convert.load(tmp_path / "student")(tokens()).logits, expected)
        else:
            with refused(message):
                convert.load(tmp_path / "student")


# -- what reaches the layers, and what is left afterwards


@torch.no_grad()
def test_encoders_have_the_defaults_of_the_papers_bert(tmp_path):
    """What is given goes before them; other models keep those of SEAConfig, also with an encoder of images inside."""

    def configs(model, **options):
        return [m.sea.config for m in convert.attention_modules(convert.attach(model, **options))]

    def chosen(model, **options):
        return {(c.causal, c.width, c.nbf, c.group, c.cell_keys) for c in configs(model, **options)}

    assert chosen(tiny("bert")) == {(False, 128, 1, "batch", True)}
    assert chosen(tiny("bert"), width=16, group=None, nbf=2, cell_keys=False) == {(False, 16, 2, "causal_batch", False)}
    assert {c.group for c in configs(tiny("bert"), method="performer", topk=3)} == {"causal_batch"}
    llama = tiny("llama")
    llama.config.is_causal = False
    assert chosen(llama) == chosen(tiny("llama"), causal=False) == {(False, 128, 1, "batch", True)}
    assert chosen(tiny("llama")) == chosen(tiny("bert"), causal=True) == {(True, 256, 8, "kv", True)}
    mixed, _ = image_and_text("LlavaForConditionalGeneration", "llama")
    assert chosen(mixed) == {(False, 256, 8, "causal_batch", True), (True, 256, 8, "kv", True)}
    model, x = moved(convert.attach(tiny("bert"), topk=3)), tokens()
    convert.save(model, tmp_path / "student")
    loaded = convert.load(tmp_path / "student")
    assert torch.equal(loaded(x)[0], model(x)[0])
    before = loaded(x)[0]
    convert.set_option(loaded, topk=2)
    assert convert.attention_modules(loaded)[0].sea.config.group == "batch" and not torch.equal(loaded(x)[0], before)


def test_new_weights_have_the_dtype_of_the_model():
    model = convert.attach(tiny("llama").bfloat16(), **SEA)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(tokens()).logits.isfinite().all()


@torch.no_grad()
def test_sequences_picked_from_a_cache_go_on_as_they_were():
    """With the estimator's state. What the cache of a student cannot do is refused."""
    model, x = convert.attach(tiny("llama"), **SEA, query_stride=2), tokens(batch=3, n=12)
    cache = model(x[:, :-1], use_cache=True).past_key_values
    for layer in cache.layers:
        layer.batch_select_indices(torch.tensor([2, 0]))
    alone = model(x[[2, 0]], use_cache=False).logits[:, -1]
    torch.testing.assert_close(model(x[[2, 0], -1:], past_key_values=cache).logits[:, -1], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="^past_key_values: expected a cache that stays where it is"):
        cache.layers[0].offload()


@torch.no_grad()
def test_recording_ends_with_an_error():
    model, x = convert.attach(tiny("opt"), **SEA), tokens()
    with pytest.raises(KeyError), convert.record(model) as records:
        raise KeyError
    model(x)
    assert not records


@torch.no_grad()
def test_heads_may_be_larger_than_their_share_of_the_hidden_size():
    model, x = build("LlamaForCausalLM", dict(head_dim=8)), tokens()
    expected = model(x).logits
    torch.testing.assert_close(keep_every_key(model)(x).logits, expected, rtol=1e-4, atol=3e-4)


# -- saving and loading


def write(path: Path, kind: str, text: str) -> None:
    if kind == "folder":
        (path / "within").mkdir(parents=True)
        path = path / "within/file"
    path.write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(x.relative_to(folder)): x.read_text() for x in folder.rglob("*") if x.is_file()}


def watch(monkeypatch, before_each) -> list[tuple[str, ...]]:
    """The calls that put files on the disk and under their names, as they are made; before_each(how many they are) comes first."""
    calls = []

    def watched(name, names_of):
        real = getattr(os, name)

        def call(*args):
            calls.append((name, *names_of(*args)))
            before_each(len(calls))
            return real(*args)

        monkeypatch.setattr(os, name, call)

    watched("fsync", lambda descriptor: [Path(os.readlink(f"/proc/self/fd/{descriptor}")).name])
    watched("replace", lambda a, b: [Path(a).name, Path(b).name])
    return calls


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("exists", [False, True])
def test_what_replaces_is_on_the_disk_before_it_has_the_name(kind, exists, tmp_path, monkeypatch):
    """Else a power loss leaves a name with nothing, or half, behind it."""
    if exists:
        write(tmp_path / "it", kind, "old")
    calls = watch(monkeypatch, lambda _: None)
    with convert.replacing(tmp_path / "it") as new:
        write(new, kind, "new")
    renamed = calls.index(("replace", ".it.sea-new", "it"))
    written = {".it.sea-new", "within", "file"} if kind == "folder" else {".it.sea-new"}
    assert {call[1] for call in calls[:renamed] if call[0] == "fsync"} == written
    assert calls[renamed + 1 :] == [("fsync", tmp_path.name)]
    assert set(contents(tmp_path).values()) == {"new"} and [x.name for x in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_replacement_that_is_killed_leaves_the_old_or_the_new(kind, exists, tmp_path, monkeypatch):
    """The state of the disk before each operation is what a kill leaves; the next replacement cleans up."""
    path = tmp_path / "disk/it"
    path.parent.mkdir()
    if exists:
        write(path, kind, "old")
    with monkeypatch.context() as patch:
        watch(patch, lambda n: shutil.copytree(path.parent, tmp_path / f"killed{n}"))
        with convert.replacing(path) as new:
            write(new, kind, "new")
    for disk in tmp_path.glob("killed*"):
        found = convert.whole(disk / "it")
        if exists:
            assert (found / "within/file" if kind == "folder" else found).read_text() in ("old", "new")
        with convert.replacing(disk / "it") as new:
            assert (disk / "it").exists() or not exists
            write(new, kind, "next")
        assert [x.name for x in disk.iterdir()] == ["it"] and set(contents(disk).values()) == {"next"}


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_replacement_that_fails_leaves_what_was(kind, exists, tmp_path, monkeypatch):
    path = tmp_path / "it"
    if exists:
        write(path, kind, "old")
    before, names, failing = contents(tmp_path), list(tmp_path.iterdir()), 0
    while convert.whole(path) == path and contents(tmp_path) == before:
        assert list(tmp_path.iterdir()) == names
        failing += 1

        def fail(n, failing=failing):
            if n == failing:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            calls = watch(patch, fail)
            with convert.replacing(path) as new:
                write(new, kind, "new")
    assert calls[-1] == ("fsync", tmp_path.name)  # the last one comes when the new one has the name
    assert set(contents(path.parent if kind == "file" else path).values()) == {"new"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_leads_to_what_replaces(kind, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere/path", kind, "old")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere/path")
    with convert.replacing(tmp_path / "link") as new:
        write(new, kind, "new")
    assert (tmp_path / "link").is_symlink() and set(contents(tmp_path / "elsewhere").values()) == {"new"}
    assert {x.name for x in tmp_path.iterdir()} == {"elsewhere", "link"}


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """With weights that are not what a fresh model would start from."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def student(kind: str = "opt", **options) -> torch.nn.Module:
    return moved(convert.attach(tiny(kind), **{**SEA, **options}))


def assert_same(loaded: torch.nn.Module, model: torch.nn.Module) -> None:
    with torch.no_grad():
        assert torch.equal(loaded(tokens())[0], model(tokens())[0])
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_save_wrote_loads(kind, tmp_path):
    """Of every family, also of those whose weights transformers saves under other names than their modules have."""
    model = student(kind)
    model.tie_weights()
    convert.save(model, tmp_path / "student")
    convert.save(model, tmp_path / "student")  # in place of itself
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert_same(convert.load(tmp_path / "student"), model)
    plain = tiny(kind)
    convert.save(plain, tmp_path / "teacher")
    assert_same(type(plain).from_pretrained(tmp_path / "teacher"), plain)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama"])
def test_resized_and_untied_embeddings_are_kept(kind, tied, tmp_path):
    model = tiny(kind)
    model.resize_token_embeddings(VOCAB + 6)
    if not tied:  # by hand, so that the config does not know
        model.get_output_embeddings().weight = torch.nn.Parameter(torch.randn(VOCAB + 6, 16))
    model = moved(convert.attach(model, **SEA))
    convert.save(model, tmp_path / "student")
    assert_same(convert.load(tmp_path / "student"), model)


class MyOPT(transformers.OPTForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.flip(-1)
        return output


def test_a_class_of_ones_own_is_asked_for_and_loads(tmp_path):
    model = moved(convert.attach(MyOPT(tiny("opt").config).eval(), width=8))
    convert.save(model, tmp_path / "student")
    with pytest.raises(ValueError, match="^folder: expected architectures to name a model .*, got 'MyOPT' .* model_class$"):
        convert.load(tmp_path / "student")
    assert_same(convert.load(tmp_path / "student", model_class=MyOPT), model)


@pytest.mark.parametrize("saver", ["convert", "transformers"])
@pytest.mark.parametrize("kind", ["opt", "llama", "bert"])
def test_transformers_own_loaders_refuse_a_student_and_name_load(kind, saver, tmp_path):
    """They would drop its SEA weights and run dense attention: the teacher's numbers under the student's name."""
    model, folder = student(kind), tmp_path / "student"
    convert.save(model, folder) if saver == "convert" else model.save_pretrained(folder)  # as Trainer does
    again = convert.load(folder)
    for saved in (again, copy.deepcopy(again)):
        saved.save_pretrained(tmp_path / "again")
        for loader in (type(model), transformers.AutoModel, transformers.AutoModelForCausalLM):
            for source in (folder, tmp_path / "again"):
                with pytest.raises(ValueError, match="convert.load"):
                    loader.from_pretrained(source)
    with pytest.raises(Exception, match="convert.load"):
        transformers.pipeline("text-generation", model=str(folder))
    assert_same(convert.load(tmp_path / "again"), model)
    convert.save(tiny(kind), tmp_path / "plain")
    assert_same(type(model).from_pretrained(tmp_path / "plain"), tiny(kind))


def test_attach_refuses_a_student_and_leaves_it(tmp_path):
    model, x = student(), tokens()
    before, weights = model(x).logits, copy.deepcopy(model.state_dict())
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(ValueError, match="^model: expected one without SEA.*, got a student"):
        convert.attach(model, width=8)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items()) and torch.equal(model(x).logits, before)


@pytest.mark.parametrize("option", ["widht", "n_head", "n_kv_head"])
def test_attach_names_the_options_that_it_does_not_know(option):
    with pytest.raises(ValueError, match=f"^options: expected some of width, topk, .*, got {option}$"):
        convert.attach(tiny("opt"), **{option: 8})


def test_each_layer_has_features_of_its_own():
    for options in ({}, {"seed": 5}):
        first, second = (m.sea.projection for m in convert.attention_modules(student(**options)))
        assert not torch.equal(first, second)


def test_attach_names_a_seed_that_is_no_number():
    with refused("seed: expected an integer of 64 bits, got 'x'$"):
        convert.attach(tiny("llama"), seed="x")


@pytest.mark.filterwarnings("ignore")
def test_adapters_come_after_attach_and_both_ways_of_saving_them_load(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is no dependency")
    wrap = lambda model: peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model, x = student("llama"), tokens()
    convert.save(model, tmp_path / "student")
    tuned = wrap(model)
    assert any(".sea." in name and "lora" in name for name, _ in tuned.named_parameters())
    tuned(x, labels=x).loss.backward()
    torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1).step()
    expected = tuned.eval()(x).logits.detach()
    for whole in (tuned, model):
        with pytest.raises(ValueError, match="^model: expected one without PEFT's adapters, .*merge_and_unload.*save_pretrained"):
            convert.save(whole, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(convert.load(tmp_path / "student"), tmp_path / "adapter")
    assert torch.equal(loaded(x).logits, expected)
    convert.save(tuned.merge_and_unload(), tmp_path / "merged")
    torch.testing.assert_close(convert.load(tmp_path / "merged")(x).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="^model: expected one without PEFT's adapters, which come after attach"):
        convert.attach(wrap(tiny("llama")), width=8)


@torch.no_grad()
def test_options_reach_layers_that_peft_trains_whole(tmp_path):
    """Its copies of them, and the originals below."""
    peft = pytest.importorskip("peft", reason="PEFT is no dependency")
    plain, x = student("llama"), tokens()
    tuned = peft.get_peft_model(student("llama"), peft.LoraConfig(modules_to_save=["sea"], target_modules=["q_proj"]))
    for options in (dict(topk=20), dict(bin=0), dict(bin=1), dict(dense_below=20)):
        for model in (tuned, plain):
            convert.set_option(model, **options)
        assert torch.equal(tuned(x).logits, plain(x).logits)
    assert torch.equal(tuned(x[:, :19], use_cache=False).logits, plain(x[:, :19]).logits)
    assert torch.equal(tuned.merge_and_unload()(x).logits, plain(x).logits)


def test_where_save_writes(tmp_path, monkeypatch):
    """An empty folder, behind a link, under any spelling; not over the working directory, nor a file."""
    model = student()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    for folder in ("empty", "link", "link/.", "new/", "empty/../empty"):
        convert.save(model, f"{tmp_path}/{folder}")
        assert_same(convert.load(f"{tmp_path}/{folder}"), model)
    assert (tmp_path / "link").is_symlink()
    assert {x.name for x in tmp_path.iterdir()} == {"empty", "link", "file", "new"}
    monkeypatch.setattr(model, "save_pretrained", lambda *_, **__: pytest.fail("worked before it refused"))
    monkeypatch.chdir(tmp_path / "empty")
    for folder in (".", "./", tmp_path / "empty"):
        with pytest.raises(ValueError, match="^path: expected none that holds the working directory"):
            convert.save(model, folder)
    (tmp_path / "new/within").mkdir()
    monkeypatch.chdir(tmp_path / "new/within")
    with pytest.raises(ValueError, match="^path: expected none that holds the working directory"), convert.replacing(tmp_path / "new"):
        pytest.fail("wrote before it refused")
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="^folder: expected a new folder, or one of a saved model and nothing else, got .*file"):
        convert.save(model, tmp_path / "file")
    assert_same(convert.load("."), model)


def test_a_student_between_two_renames_loads(tmp_path):
    model = student()
    for left in ([".student.sea-old"], [".student.sea-old", ".student.sea-new"]):
        for name in left:
            convert.save(model, tmp_path / name)
        assert convert.whole(tmp_path / "student") == tmp_path / left[-1]
        assert_same(convert.load(tmp_path / "student"), model)
    (tmp_path / ".student.sea-new/config.json").write_text("cut off")  # beside a whole one it may be anything
    convert.save(model, tmp_path / "whole")
    (tmp_path / "whole").rename(tmp_path / "student")
    assert_same(convert.load(tmp_path / "student"), model)
    convert.save(model, tmp_path / "student")
    assert [x.name for x in tmp_path.iterdir()] == ["student"]


def test_a_student_is_saved_through_replacing(tmp_path, monkeypatch):
    convert.save(student(), tmp_path / "student")
    before = {x.name: x.read_bytes() for x in (tmp_path / "student").iterdir()}
    other = student("llama")
    monkeypatch.setattr(other, "save_pretrained", lambda folder, **_: Path(folder).mkdir() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert.save(other, tmp_path / "student")
    assert {x.name: x.read_bytes() for x in (tmp_path / "student").iterdir()} == before
    calls = watch(monkeypatch, lambda _: None)
    convert.save(student(), tmp_path / "student")
    last = calls.index(("replace", ".student.sea-new", "student"))
    assert {("fsync", name) for name in (*before, ".student.sea-new")} <= set(calls[:last])


def test_weights_are_floating_point_and_loaded_as_they_were_saved(tmp_path):
    model = student().bfloat16()
    convert.save(model, tmp_path / "student")
    saved, loaded = model.state_dict(), convert.load(tmp_path / "student", torch.float32)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, saved[name].float())
    config = tmp_path / "student/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(dtype="int8")))
    with refused("folder: expected the config.json of a student .*dtype: expected a floating-point one, got torch.int8"):
        convert.load(tmp_path / "student")


def test_what_is_beside_a_student_or_in_its_folder_is_not_lost(tmp_path):
    """A copy by hand, the checkpoints of a Trainer, notes: there they stay, and a folder that has them is not replaced."""
    model = student()
    convert.save(model, tmp_path / "student")
    for name in ("student.old", "student.new"):
        shutil.copytree(tmp_path / "student", tmp_path / name)
    convert.save(model, tmp_path / "student")
    assert {x.name for x in tmp_path.iterdir()} == {"student", "student.old", "student.new"}
    for name in ("checkpoint-10", "notes.txt"):
        (tmp_path / "student" / name).mkdir()
        with refused(f"folder: expected a new folder, or one of a saved model and nothing else, got .*, which holds {name}$"):
            convert.save(model, tmp_path / "student")
        (tmp_path / "student" / name).rmdir()


def test_the_generation_config_is_saved_with_the_student(tmp_path):
    model = student()
    model.generation_config.update(max_new_tokens=7, eos_token_id=5, top_k=3, do_sample=True)
    convert.save(model, tmp_path / "student")
    loaded = convert.load(tmp_path / "student").generation_config
    assert {k: v for k, v in loaded.to_dict().items() if k != "transformers_version"} == {
        k: v for k, v in model.generation_config.to_dict().items() if k != "transformers_version"}


def test_no_code_of_a_folder_runs(tmp_path):
    convert.save(student(), tmp_path / "student")
    text = (tmp_path / "student/config.json").read_text()
    (tmp_path / "student/code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import OPTConfig as Mine")
    changes = [{"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}}]
    changes += [{"architectures": x} for x in (["pipeline"], ["OPTConfig"], ["nn"], [], None, "pipeline", [3], ["os.system"])]
    for change in changes:
        (tmp_path / "student/config.json").write_text(json.dumps({**json.loads(text), **change}))
        with pytest.raises(ValueError, match="^folder: expected (architectures to name a model|a config.json)"):
            convert.load(tmp_path / "student")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_config_that_was_tampered_with_is_refused_in_a_sentence(kind, tmp_path):
    """Every field, missing or of another kind or far too large: the same logits, or one sentence, and soon."""
    model, x, folder = student(kind), tokens(), tmp_path / "student"
    convert.save(model, folder)
    expected, config = model(x).logits, json.loads((folder / "config.json").read_text())
    fields = [(config, name) for name in list(config)] + [(config["sea"], name) for name in list(config["sea"])]
    must_fail = {"width", "topk", "nbf", "cell_keys", "group", "backend", "method", "query_stride", "bin", "local", "first", "candidates",
                 "dense_below"}
    for where, name in fields:
        right = where.pop(name)
        for wrong in ("missing", None, True, -1, 10**9, "x", [], {"a": 1}):
            if wrong == 10**9 and name in ("topk", "query_stride", "nbf", "candidates", "dense_below") or wrong is True and name == "cell_keys" or wrong is None and name == "group":
                continue  # a right value too
            if wrong != "missing":
                where[name] = wrong
            (folder / "config.json").write_text(json.dumps(config))
            try:
                loaded = convert.load(folder)
            except (ValueError, OSError) as error:
                assert "\n" not in str(error), (name, wrong)
            else:
                assert wrong == "missing" or name not in must_fail, (name, wrong)
                try:
                    assert torch.equal(loaded(x).logits, expected), (name, wrong)
                except ValueError:
                    pass  # refused when it runs
        where[name] = right
    for text in ("", "{", "[]", "3", "null", "\x00" * 9):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match="^folder: expected [^\\n]*$"):
            convert.load(folder)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:40], lambda b: b[:-5], lambda b: b"\xff" * len(b)])
def test_weights_that_are_cut_off_are_refused_in_a_sentence(damage, tmp_path):
    convert.save(student(), tmp_path / "student")
    file = tmp_path / "student/model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="^folder: expected whole weights in [^\\n]*$"):
        convert.load(tmp_path / "student")


def test_a_record_within_another_of_the_same_model_is_refused():
    """Also from another thread; records of two models do not see each other."""
    model, other, x = student(), student("llama"), tokens()
    errors = []

    def in_a_thread():
        try:
            with convert.record(model):
                pass
        except ValueError as error:
            errors.append(str(error))

    with convert.record(model) as outer:
        with pytest.raises(ValueError, match="^model: expected no other record"), convert.record(model.model):
            pass
        thread = threading.Thread(target=in_a_thread)
        thread.start()
        thread.join()
        with convert.record(other) as inner:
            model(x), other(x)
    assert len(errors) == 1 and len(outer) == len(inner) == 2
    with convert.record(model) as records:
        model(x)
    assert len(records) == 2 and len(outer) == 2


@pytest.mark.parametrize("begun", [0, 5])  # tokens in the cache
@pytest.mark.parametrize("layer, part", [(0, "attention"), (0, "behind"), (1, "attention"), (1, "behind")])
@pytest.mark.parametrize("n", [1, 3])
@torch.no_grad()
def test_a_cache_that_a_failed_call_left_is_refused(begun, layer, part, n, monkeypatch):
    """Its layers, or a layer and its state, hold different numbers of tokens: a retry would answer wrongly."""
    model, x = student("llama"), tokens(n=9)
    cache = transformers.DynamicCache(config=model.config)
    if begun:
        model(x[:, :begun], past_key_values=cache)
    broken = model.model.layers[layer]
    broken = broken.self_attn.sea if part == "attention" else broken.mlp
    with monkeypatch.context() as patch:
        patch.setattr(broken, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x[:, begun : begun + n], past_key_values=cache)
    whole = layer == 1 and part == "behind"  # every layer has taken the tokens in
    for _ in range(2):
        if whole:
            model(x[:, begun + n : begun + n + 1], past_key_values=cache)
        else:
            with pytest.raises(ValueError, match="^past_key_values: expected as many tokens .* begin with a new cache$"):
                model(x[:, begun : begun + n], past_key_values=cache)


@torch.no_grad()
def test_a_batch_that_is_repeated_keeps_its_state():
    model, x = student(), tokens(n=9)
    cache = model(x[:, :6]).past_key_values
    cache.batch_repeat_interleave(2)
    got = model(x[:, 6:].repeat_interleave(2, 0), past_key_values=cache).logits
    torch.testing.assert_close(got, model(x).logits[:, 6:].repeat_interleave(2, 0), rtol=1e-4, atol=1e-4)


def test_lm_eval_scores_a_student_as_it_is(tmp_path):
    """A task in the manner of MMLU: with all keys and open gates the model's log-likelihoods, with few keys others."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not a dependency")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["</s>", "which", "one", "is", "first", "second", "third", "Answer", ":", ".", "A", "B", "C", "D"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    rows = [dict(question=f"which one is {word} " * 3, answer=i) for i, word in enumerate(("first", "second", "third"))]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(f"""
task: made_up
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path}/rows.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} Answer :"
doc_to_choice: [A, B, C, D]
doc_to_target: answer
metric_list: [{{metric: acc}}]
""")

    def likelihoods(model):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=SEQ)
        found = lm_eval.simple_evaluate(lm, tasks=["made_up"], task_manager=TaskManager(include_path=str(tmp_path)), bootstrap_iters=0)
        assert found["results"]["made_up"]["acc,none"] in (0, 1 / 3, 2 / 3, 1)
        return torch.tensor([[float(x[0][0]) for x in sample["resps"]] for sample in found["samples"]["made_up"]])

    expected = likelihoods(tiny("opt"))
    same, other = keep_every_key(tiny("opt")), convert.attach(tiny("opt"), **{**SEA, "topk": 5})
    torch.testing.assert_close(likelihoods(same), expected, rtol=1e-4, atol=1e-4)
    convert.save(other, tmp_path / "student")
    assert expected.shape == (3, 4) and not torch.allclose(likelihoods(convert.load(tmp_path / "student")), expected, atol=1e-3)
