"""Laws of convert.py: SEA in models of many families, on random weights that take seconds."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import (AutoConfig, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig,
                          OPTForCausalLM)

import convert
import sea

VOCAB, SEQ = 64, 24


def tiny(kind: str) -> torch.nn.Module:
    """A random model of each family that the attention interface serves, and the odd shapes of OPT."""
    torch.manual_seed(0)
    opt = dict(vocab_size=VOCAB, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
               max_position_embeddings=SEQ, dropout=0.0, init_std=0.3)
    shape = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=SEQ, initializer_range=0.3)
    models = {
        "opt": lambda: OPTForCausalLM(OPTConfig(**opt)),
        "opt-350m": lambda: OPTForCausalLM(OPTConfig(**{**opt, "word_embed_proj_dim": 8, "do_layer_norm_before": False})),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=SEQ,
                                                   initializer_range=0.3, bos_token_id=0, eos_token_id=0)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2)),
        "bert": lambda: BertModel(BertConfig(**shape)),
    }
    return models[kind]().eval()


MODELS = ("opt", "opt-350m", "gpt2", "llama", "bert")


def tokens(batch: int = 2, n: int = SEQ) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, n), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@torch.no_grad()
def test_full_mask_and_open_gates_is_the_model_itself(kind, padding):
    """Scale, heads, causality and padding reach SEA as they reach SDPA."""
    model, x = tiny(kind), tokens()
    mask = torch.ones_like(x)
    if padding != "none":
        mask[0, :7] = 0
        mask = mask.flip(1) if padding == "right" else mask
    if kind == "gpt2":  # it counts positions from the first column, padding or not
        position = (mask.cumsum(1) - 1).clamp(min=0)
        run = lambda: model(x, attention_mask=mask, position_ids=position)[0]
    else:
        run = lambda: model(x, attention_mask=mask)[0]
    expected = run()
    convert.attach(model, width=8, topk=SEQ)
    for module in convert.attention_modules(model):
        module.sea.gate.bias.fill_(60.0)
    valid = mask.bool()
    torch.testing.assert_close(run()[valid], expected[valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_saved_student_reloads_to_the_same_logits(kind, tmp_path):
    model, x = convert.attach(tiny(kind), width=8, topk=3), tokens()
    for parameter in model.parameters():  # not what a fresh SEA would start from
        parameter.add_(0.1 * torch.randn_like(parameter))
    model.tie_weights()
    convert.save(model, tmp_path / "student")
    convert.save(model, tmp_path / "student")  # in place of itself
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    loaded = convert.load(tmp_path / "student")
    assert torch.equal(loaded(x)[0], model(x)[0])
    assert loaded.state_dict().keys() == model.state_dict().keys()


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
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(ValueError, match="^folder: expected a new folder or a saved model"):
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
    with pytest.raises(ValueError, match="^attention_mask: expected 2 dimensions"):
        convert.attach(tiny("llama"), width=8)(x, attention_mask=torch.ones(2, 1, SEQ, SEQ, dtype=torch.bool))
    with pytest.raises(ValueError, match="^model: expected self-attention modules"):
        convert.attach(torch.nn.Linear(2, 2))
    bart = transformers.BartConfig(vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                                   decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)
    with pytest.raises(ValueError, match="^model: expected self-attention only, got BartForConditionalGeneration"):
        convert.attach(transformers.BartForConditionalGeneration(bart))
    with pytest.raises(ValueError, match="^method: expected one of .*'performer'.*, got 'flash'"):
        convert.attach(tiny("opt"), method="flash")
    with pytest.raises(ValueError, match="^query_stride: expected 1 for a Performer, got 3"):
        convert.attach(tiny("opt"), method="performer", query_stride=3)
    with pytest.raises(ValueError, match="^options: expected topk, group or backend, got width"):
        convert.set_option(convert.attach(tiny("opt"), width=8), width=9)


def recomputed(model, x, mask, steps: int) -> torch.Tensor:
    """Greedy tokens, each from a forward pass over the whole sequence."""
    for _ in range(steps):
        position = (mask.cumsum(1) - 1).clamp(min=0)  # as generate() counts
        x = torch.cat([x, model(x, attention_mask=mask, position_ids=position, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask[:, :1] | True], 1)
    return x


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("stride, cell_keys", [(1, False), (1, True), (3, True)])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_generate_gives_the_tokens_of_full_recomputation(kind, stride, cell_keys, padded, tmp_path):
    """Greedy, with transformers' cache, left-padded too, for a student saved and loaded; grouped-query and rotary included."""
    model = convert.attach(tiny(kind), width=5, topk=3, query_stride=stride, cell_keys=cell_keys)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    model.tie_weights()
    convert.save(model, tmp_path / "student")
    model, x = convert.load(tmp_path / "student"), tokens(n=7)
    mask = torch.ones_like(x)
    if padded:
        mask[0, :4] = 0
    for options in (dict(use_cache=True), dict(use_cache=False), dict(prefill_chunk_size=3)):
        model.generation_config.eos_token_id = None
        out = model.generate(x, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=1, **options)
        assert torch.equal(out, recomputed(model, x, mask.bool(), 9)), options


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@torch.no_grad()
def test_a_long_prefill_in_chunks_is_the_same(kind, padding, monkeypatch):
    model, x = convert.attach(tiny(kind), width=8, topk=3, query_stride=2), tokens(n=16)
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


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(num_beams=2, num_return_sequences=2), dict(do_sample=True, top_k=5),
                                     dict(do_sample=True, num_return_sequences=3)])
@torch.no_grad()
def test_beams_and_samples_are_the_same_with_and_without_a_cache(options):
    """The state follows reordering and expansion of the batch."""
    model, x = convert.attach(tiny("opt"), width=8, topk=3, query_stride=2), tokens(n=6)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(model.generate(x, max_new_tokens=8, min_new_tokens=8, use_cache=use_cache, pad_token_id=1, **options))
    assert torch.equal(*results)


@torch.no_grad()
def test_the_state_in_the_cache_is_constant_in_size():
    model = convert.attach(tiny("llama"), width=8, topk=3)
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


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_output_attentions_gives_the_sparse_attention(kind, monkeypatch):
    """As users of transformers expect it: a (B, H, T, T) tensor a layer, over the positions of a padded batch."""
    model, x = convert.attach(tiny(kind), width=8, topk=3), tokens()
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
        sparse = sea.torch_operations.sparse_attention(r.q[1:], r.k[1:], r.v[1:], r.sea.mask[1:], r.sea.seen[1:], r.scale)
        torch.testing.assert_close(weights[1:] @ v[1:], sparse, rtol=1e-4, atol=1e-5)
    assert not model(x).attentions  # nobody asked
    monkeypatch.setattr(convert, "MOST_WEIGHTS", 100)
    with pytest.raises(ValueError, match="^output_attentions: expected at most 100 numbers a layer, got .*attention_csr"):
        model(x, output_attentions=True)
    assert not any(m.sea_weights for m in convert.attention_modules(model)), "kept asking after a run that failed"


def test_set_option_reaches_every_layer_and_survives_saving(tmp_path):
    model, x = convert.attach(tiny("opt"), width=8, topk=2), tokens()
    few = model(x).logits
    convert.set_option(model, topk=9)
    assert not torch.equal(model(x).logits, few)
    convert.save(model, tmp_path / "student")
    assert {m.sea.config.topk for m in convert.attention_modules(convert.load(tmp_path / "student"))} == {9}


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
    assert AutoConfig.from_pretrained(tmp_path / "again").sea == config.sea  # nor do its files change


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
    renamed = calls.index(("replace", "it.new", "it"))
    written = {"it.new", "within", "file"} if kind == "folder" else {"it.new"}
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
