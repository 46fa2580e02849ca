"""CLIP, ViCLIP and AMT's wrapping beside their references, with random weights, and what files may be like."""

import gzip
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from helios_jax.heliosbench import bench_cli, clip_text, model_files, recipes, vit
from helios_jax.heliosbench.aesthetic import Aesthetic
from helios_jax.heliosbench.bench_frames import Frame, read_frames
from helios_jax.heliosbench.clip_pixels import clip_pixels
from helios_jax.heliosbench.measure import View
from helios_jax.heliosbench.metric import Clip, MetricError
from helios_jax.heliosbench.recipes import Needs
from helios_jax.heliosbench.semantic import Semantic
from helios_jax.heliosbench.smoothness import Smoothness, between
from helios_jax.heliosbench.vit import (
    PICTURES,
    TEXTS,
    VIDEOS,
    Encoder,
    Tensors,
    encode_pictures,
    encode_texts,
    encode_video,
)
from helios_jax.media.mp4 import VideoWriter
from helios_jax.pretrained.errors import CheckpointError
from tests.heliosbench.fake_judge import serve
from tests.heliosbench.tiny_networks import (
    GRID,
    LAYERS,
    MERGES,
    OUT,
    PATCH,
    WIDTH,
    pictures,
    random,
    vocabulary,
    write_all,
)  # fmt: skip

RNG = np.random.default_rng(0)


def their_vision():
    """transformers' encoder with random weights."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=WIDTH // 64,
        image_size=GRID * PATCH, patch_size=PATCH, projection_dim=OUT,
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def theirs_named(model) -> Tensors:
    return model_files.openai_names(reads({key: value.numpy() for key, value in model.state_dict().items()}))


def reads(arrays: dict[str, np.ndarray]) -> Tensors:
    """Arrays as they come from a file: read when they are called."""
    return {key: partial(np.copy, value) for key, value in arrays.items()}


@pytest.mark.reference
def test_pictures_beside_transformers():
    import torch

    model = their_vision()
    encoder = Encoder.of(theirs_named(model), PICTURES, "visual.", "test")
    pixels = RNG.normal(size=(3, GRID * PATCH, GRID * PATCH, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).image_embeds.numpy()
    np.testing.assert_allclose(encode_pictures(encoder, pixels), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.reference
@pytest.mark.parametrize("long", [512, 16])
def test_videos_beside_transformers_layers(monkeypatch, long):
    """ViCLIP is CLIP's transformer over one class token and the patches of all frames, which know their time."""
    import torch

    monkeypatch.setattr(vit, "LONG", long)
    encode_video.clear_cache()

    model = their_vision()
    arrays = {key: read() for key, read in theirs_named(model).items()}
    arrays["visual.conv1.weight"] = arrays["visual.conv1.weight"][:, :, None]
    time = arrays["visual.temporal_positional_embedding"] = random((1, 8, WIDTH))
    encoder = Encoder.of(reads(arrays), VIDEOS, "visual.", "test")
    pixels = RNG.normal(size=(8, GRID * PATCH, GRID * PATCH, 3)).astype(np.float32)
    vision = model.vision_model
    with torch.no_grad():
        each = vision.embeddings(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
        patches = each[:, 1:] + torch.from_numpy(time[0])[:, None]
        tokens = torch.cat([each[:1, 0], patches.reshape(-1, WIDTH)])[None]
        hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(tokens)).last_hidden_state
        theirs = model.visual_projection(vision.post_layernorm(hidden[:, 0]))[0].numpy()
    np.testing.assert_allclose(encode_video(encoder, pixels), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.reference
def test_texts_beside_transformers():
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64, max_position_embeddings=32, projection_dim=OUT, eos_token_id=49,
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config).eval()
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    named = {key.replace("text_model.encoder", "vision_model.encoder"): value for key, value in state.items()}
    found = model_files.openai_names(reads(named))
    arrays = {key.removeprefix("visual."): read() for key, read in found.items()}
    arrays |= {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
    }
    tokens = np.zeros((2, 32), np.int32)
    tokens[0, :5], tokens[1, :3] = [48, 7, 8, 9, 49], [48, 3, 49]
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).text_embeds.numpy()
    ours = encode_texts(Encoder.of(reads(arrays), TEXTS, "", "test"), tokens)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_weights_in_half_precision_take_half_the_memory():
    """The numbers stay: CLIP was released in float16."""
    arrays = pictures("visual.")
    halves = {key: value.astype(np.float16).astype(np.float32) for key, value in arrays.items()}
    whole, half = (Encoder.of(reads(x), PICTURES, "visual.", "test") for x in (arrays, halves))
    assert {str(x.dtype) for x in whole.layers.values()} == {"float32"}
    assert {str(x.dtype) for x in half.layers.values()} == {"float16"}
    np.testing.assert_array_equal(half.layers["ln_1.bias"][1], halves["visual.transformer.resblocks.1.ln_1.bias"])


@pytest.mark.reference
@pytest.mark.parametrize("size", [(368, 640), (640, 368), (224, 224), (100, 150)])
@pytest.mark.parametrize("rounded", [False, True])
def test_pixels_beside_torch(size, rounded):
    import torch

    rgb = RNG.integers(0, 256, (*size, 3), np.uint8)
    short = min(size)
    resized = [224 if side == short else int(224 * side / short) for side in size]
    x = torch.from_numpy(rgb).permute(2, 0, 1)[None].float()
    x = torch.nn.functional.interpolate(x, resized, mode="bicubic", align_corners=False)
    if rounded:
        x = x.clamp(0, 255).round()
    top, left = (round((side - 224) / 2) for side in resized)
    x = x[0, :, top : top + 224, left : left + 224].permute(1, 2, 0) / 255
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    difference = np.abs(clip_pixels(rgb, rounded) - ((x - mean) / std).numpy())
    assert difference.max() < (0.02 if rounded else 5e-4)  # torch's places are float32; a half is rounded either way
    assert difference.mean() < 2e-5


@pytest.mark.reference
def test_tokens_beside_transformers(tmp_path, monkeypatch):
    from transformers import CLIPTokenizer

    ours = clip_text.ClipTokenizer(vocabulary(tmp_path / "bpe.gz", monkeypatch))
    theirs = CLIPTokenizer(vocab=ours._ids, merges=list(MERGES))
    for text in ("hello", "Hello,  HELLO world", "it's 42!", "", "ﬁne – Émile’s café", "a &amp; b"):
        cleaned = clip_text.prompt_clean(text)
        assert ours(text, 40).tolist()[: len(theirs(cleaned).input_ids)] == theirs(cleaned).input_ids, text
    long = ours("hello " * 100, 8).tolist()
    assert long == [ours._ids[clip_text.START], *[ours._ids["hello</w>"]] * 6, ours._ids[clip_text.END]]


def test_a_vocabulary_that_is_another_file(tmp_path):
    (tmp_path / "bpe.gz").write_bytes(b"no gzip")
    with pytest.raises(CheckpointError, match="cannot be read"):
        clip_text.ClipTokenizer(tmp_path / "bpe.gz")
    (tmp_path / "bpe.gz").write_bytes(gzip.compress(b"a\nb c d\n"))
    with pytest.raises(CheckpointError, match="is not CLIP's vocabulary"):
        clip_text.ClipTokenizer(tmp_path / "bpe.gz")


@pytest.fixture
def weights(tmp_path, monkeypatch):
    return write_all(tmp_path / "weights", monkeypatch)


def test_absent_weights_are_missing(weights, tmp_path):
    names = ["aesthetic", "motion_smoothness", "semantic"]
    (weights / f"{model_files.AMT}.onnx").unlink()
    found, missing = recipes.make_recipes(names, Needs(weights), View())
    assert [one.name for one in found] == ["aesthetic", "semantic"]
    assert "has no amt_model/amt-s.onnx or amt_model/amt-s.pt" in missing["motion_smoothness"]
    _, missing = recipes.make_recipes(names, Needs(), View())
    assert set(missing) == set(names)
    assert "by --weights" in missing["semantic"]


def test_scores_are_recorded_with_their_weights(weights):
    (before,), _ = recipes.make_recipes(["aesthetic"], Needs(weights), View())
    assert json.loads(json.dumps(before.settings)) == before.settings
    head = weights / f"{model_files.HEAD}.safetensors"
    save_file({"weight": random((1, OUT)), "bias": np.zeros(1, np.float32)}, head, {"a": "other"})
    (after,), _ = recipes.make_recipes(["aesthetic"], Needs(weights), View())
    assert before.settings != after.settings


def test_files_of_other_networks_are_refused(weights):
    clip, head = (weights / f"{stem}.safetensors" for stem in (model_files.CLIP, model_files.HEAD))
    with pytest.raises(CheckpointError, match=r"lacks visual\.conv1\.weight"):
        Aesthetic(head, head)
    save_file({"weight": random((1, 7)), "bias": np.zeros(1, np.float32)}, head)
    with pytest.raises(CheckpointError, match="is not a head of 24 features"):
        Aesthetic(clip, head)
    with pytest.raises(CheckpointError, match=r"lacks text_encoder\."):
        Semantic(clip, weights / model_files.VOCABULARY)


@pytest.mark.reference
def test_weights_as_torch_saves_them(weights, tmp_path):
    import torch

    arrays = {key: torch.from_numpy(value) for key, value in pictures("visual.").items()}
    torch.save({"model": arrays}, tmp_path / "a.pth")
    read = model_files.open_weights(tmp_path / "a.pth", "visual.")
    assert read.keys() == arrays.keys()
    np.testing.assert_array_equal(read["visual.proj"](), arrays["visual.proj"].numpy())
    (tmp_path / "b.pth").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="cannot be read"):
        model_files.open_weights(tmp_path / "b.pth", "")
    linear = torch.jit.script(torch.nn.Linear(3, 2))
    linear.save(str(tmp_path / "c.pt"))
    assert set(model_files.open_weights(tmp_path / "c.pt", "")) == {"weight", "bias"}


def video(path: Path, levels: np.ndarray) -> Path:
    """Grey frames of these brightnesses."""
    with VideoWriter(path, 24, 48, 96) as writer:
        writer.write(np.ones((len(levels), 48, 96, 3), np.uint8) * levels.astype(np.uint8)[:, None, None, None])
    return path


def scores(metric, path: Path, length="long", prompt="hello") -> tuple[dict, list[Frame]]:
    """The scores of a video, and its frames."""
    frames = list(read_frames(path, (48, 96)))
    meter = metric.begin(Clip(prompt, len(frames), length))
    for frame in frames:
        meter.add(frame)
    return meter.finish().scores, frames


def test_aesthetic_scores(weights, tmp_path):
    """Batches and drifts do not change the mean of what single frames score."""
    metric = Aesthetic(*(weights / f"{stem}.safetensors" for stem in (model_files.CLIP, model_files.HEAD)))
    path = video(tmp_path / "a.mp4", np.linspace(20, 220, 37))
    found, frames = scores(metric, path)
    single = [metric.score([clip_pixels(frame.scaled, False, 12)])[0] for frame in frames]
    assert np.std(single) > 1e-4
    assert found["aesthetic"]["aesthetic_score"] == pytest.approx(np.mean(single), abs=1e-6)
    ends = found["drifting_aesthetic"]
    assert ends["start_aesthetic_score"] == pytest.approx(np.mean(single[:5]), abs=1e-6)
    assert ends["end_aesthetic_score"] == pytest.approx(np.mean(single[-5:]), abs=1e-6)
    assert ends["drift_aesthetic_score"] == abs(ends["start_aesthetic_score"] - ends["end_aesthetic_score"])
    assert set(scores(metric, path, "short")[0]) == {"aesthetic"}


def test_semantic_scores(weights, tmp_path):
    metric = Semantic(weights / f"{model_files.VICLIP}.safetensors", weights / model_files.VOCABULARY)
    path = video(tmp_path / "a.mp4", np.linspace(20, 220, 80))
    found, frames = scores(metric, path)
    chosen = [10 * i + 4 for i in range(8)]
    pixels = [clip_pixels(frames[number].scaled, True, 12) for number in chosen]
    assert found["semantic"]["semantic_score"] == pytest.approx(metric.likeness("hello", [pixels])[0], abs=1e-6)
    assert found["semantic"] != scores(metric, path, prompt="world")[0]["semantic"]
    ends = found["drifting_semantic"]
    assert ends["drift_semantic_score"] == abs(ends["start_semantic_score"] - ends["end_semantic_score"]) > 0
    assert metric.likeness("hello", [pixels])[0] != pytest.approx(metric.likeness("hello", [pixels[::-1]])[0], abs=1e-6)


@pytest.mark.parametrize("kind", ["onnx", pytest.param("pt", marks=pytest.mark.reference)])
def test_smoothness_scores(weights, tmp_path, kind):
    """The mean of neighbours guesses even changes exactly, and a flicker of every second frame not."""
    pytest.importorskip("cv2")
    network = weights / f"{model_files.AMT}.onnx"
    if kind == "pt":
        import torch

        network = tmp_path / "amt.pt"
        torch.jit.trace(lambda a, b: (a + b) / 2, (torch.zeros(1, 3, 8, 8),) * 2).save(str(network))
    else:
        pytest.importorskip("onnxruntime")
    metric = Smoothness(network)
    even, _ = scores(metric, video(tmp_path / "even.mp4", 40 + 2 * np.arange(41)))
    assert even["motion_smoothness"]["motion_smoothness_score"] == pytest.approx(1, abs=0.005)
    assert even["drifting_motion_smoothness"]["drift_motion_smoothness_score"] < 0.005
    flicker = 100 + 20 * (np.arange(41) % 2) * (np.arange(41) < 20)
    found, _ = scores(metric, video(tmp_path / "flicker.mp4", flicker))
    assert found["motion_smoothness"]["motion_smoothness_score"] == pytest.approx(1 - 20 / 255 / 2, abs=0.01)
    assert found["drifting_motion_smoothness"]["drift_motion_smoothness_score"] == pytest.approx(20 / 255, abs=0.01)
    meter = metric.begin(Clip("", 41, "short"))
    for frame in read_frames(tmp_path / "even.mp4", (48, 96)):
        meter.add(frame)
    assert [number for number, _ in meter.finish().curve] == list(range(1, 41, 2))
    few, _ = scores(metric, video(tmp_path / "few.mp4", np.array([40, 40, 40])))
    assert few["drifting_motion_smoothness"]["start_motion_smoothness_score"] == 0
    with pytest.raises(MetricError, match="needs 3 frames"):
        scores(metric, video(tmp_path / "two.mp4", np.array([40, 40])))


def test_frames_between_have_the_size_of_their_neighbours():
    """The network sees a multiple of 16, with edges repeated."""
    seen = []

    def interpolate(before, after):
        seen.append(before)
        return (before + after) / 2

    rgb = RNG.integers(0, 256, (40, 90, 3), np.uint8)
    assert np.abs(between(interpolate, rgb, rgb).astype(int) - rgb).max() <= 1  # values are cut, not rounded
    assert seen[0].shape == (1, 3, 48, 96)
    np.testing.assert_array_equal(seen[0][:, :, 0, 3:-3], seen[0][:, :, 4, 3:-3])


def test_a_network_that_is_no_network(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "a.onnx").write_bytes(b"no network")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Smoothness(tmp_path / "a.onnx")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_weights_that_are_damaged_end_the_run(weights, tmp_path, capsys, workers):
    (tmp_path / "model").mkdir()
    video(tmp_path / "model" / "1_9_ori9.mp4", np.linspace(20, 220, 9))
    (tmp_path / "prompts.csv").write_text("id,prompt,duration\n1,hello,40\n")
    (weights / f"{model_files.HEAD}.safetensors").write_bytes(b"no weights")
    arguments = [str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.csv"), "--out", str(tmp_path / "out")]
    assert bench_cli.main([*arguments, "--weights", str(weights), "--metrics", "aesthetic", "--workers", workers]) == 2
    said = capsys.readouterr().err
    assert "is not a whole safetensors file" in said
    assert said.count("\n") == 1


def test_all_metrics_make_a_whole_total(weights, tmp_path, capsys):
    for module in ("cv2", "onnxruntime", "openai"):
        pytest.importorskip(module)
    (tmp_path / "model").mkdir()
    video(tmp_path / "model" / "1_40_ori40.mp4", np.linspace(20, 220, 40))
    (tmp_path / "prompts.csv").write_text("id,prompt,duration\n1,hello,40\n")
    arguments = [str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.csv"), "--out", str(tmp_path / "out")]
    with serve("4") as fake:
        given = ["--weights", str(weights), "--judge", fake.url, "--size", "48x96"]
        assert bench_cli.main([*arguments, *given]) == 0
    assert "(complete)" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out/model/merged_results.json").read_text())["summary"]
    assert len(summary["non_drifting"]) == 5
    assert len(summary["drifting"]) == 4
    item = json.loads((tmp_path / "out/model/semantic_results.json").read_text())["per_video_results"][0]
    assert list(item) == ["id", "video_name", "prompt", "semantic_score"]
