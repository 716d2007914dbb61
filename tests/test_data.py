"""Files become model inputs, and what is wrong with a file is said in one sentence that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers as t

import clover
import families
from clover.command.options import batches_of
from clover.errors import CloverError
from clover.measure import data, files
from clover.model import traits
from samples import (
    SPECIAL,
    TINY,
    WORDS,
    bert,
    clip,
    llama,
    questions_file,
    text_file,
    tokenizer,
    whisper_config,
    whisper_processor,
)


def test_text_windows_are_full_spread_and_run(tmp_path: Path) -> None:
    path, model = text_file(tmp_path, 700), llama()
    batches = data.calibration_batches(path, model, processor=tokenizer(), sequences=6, length=32)
    rows = torch.cat([b["input_ids"] for b in batches])
    assert [len(b["input_ids"]) for b in batches] == [4, 2] and rows.shape == (6, 32)
    assert all(
        torch.equal(row.diff() % 50, torch.ones(31, dtype=torch.long)) for row in rows
    )  # consecutive words of the text
    starts = [(row[0].item() - 4) % 50 for row in rows]
    assert starts == [i * 21 // 6 * 32 % 50 for i in range(6)]
    for batch in batches:
        model(**batch)
    (short,) = data.calibration_batches(text_file(tmp_path, 10), model, processor=tokenizer())
    assert short["input_ids"].shape == (1, 10)


@pytest.mark.parametrize("words", [40, 5000, 100_000])
@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_windows_of_an_encoder_carry_the_special_tokens(tmp_path: Path, kind: str, words: int) -> None:
    model = bert(kind)
    batches = data.calibration_batches(
        text_file(tmp_path, words), model, processor=tokenizer(brackets=True), sequences=4
    )
    rows = torch.cat([b["input_ids"] for b in batches])
    positions = traits.max_positions(model)
    assert positions == (34 if kind == "Bert" else 33)  # RoBERTa's table starts behind its padding row
    assert rows.shape == (4 if words > 40 else 1, positions)
    assert set(rows[:, 0].tolist()) == {2} and set(rows[:, -1].tolist()) == {3} and 3 not in rows[:, :-1]
    model(input_ids=rows)


def test_questions_calibrate_as_text(tmp_path: Path) -> None:
    path = questions_file(tmp_path / "q.jsonl", *[{"instruction": "w1 w2", "answer": "w3", "output": "w4"}] * 20)
    (batch,) = data.calibration_batches(path, llama(), processor=tokenizer(), length=12, sequences=2)
    assert batch["input_ids"].shape == (2, 12) and batch["input_ids"][0, :6].tolist() == [5, 6, 8, 5, 6, 8]


@pytest.mark.parametrize("name", ["t5", "bart", "marian", "m2m100"])
def test_a_decoder_reads_the_same_text_a_token_later(name: str, tmp_path: Path) -> None:
    model, _ = families.build(name, torch.float32)
    (batch,) = data.calibration_batches(text_file(tmp_path, 200), model, processor=tokenizer(), length=9, sequences=2)
    ids, later = batch["input_ids"], batch["decoder_input_ids"]
    assert ids.shape == later.shape == (2, 9) and torch.equal(later[:, 1:], ids[:, :-1])
    assert set(later[:, 0].tolist()) == {model.config.decoder_start_token_id}
    model(**batch)


@pytest.mark.parametrize("name", ["llava", "paligemma", "gemma3-image"])
def test_models_of_images_that_write_take_text(name: str, tmp_path: Path) -> None:
    model, _ = families.build(name, torch.float32)
    (batch,) = data.calibration_batches(text_file(tmp_path, 200), model, processor=tokenizer(), length=9, sequences=2)
    model(**batch)
    with pytest.raises(CloverError, match="reads text; give it that"):
        data.calibration_batches(tmp_path, model)


def test_a_processor_in_the_place_of_a_tokenizer(tmp_path: Path) -> None:
    model, _ = families.build("llama-gqa", torch.float32)
    both = SimpleNamespace(tokenizer=tokenizer())
    (batch,) = data.calibration_batches(text_file(tmp_path, 200), model, processor=both, length=9, sequences=2)
    assert batch["input_ids"].shape == (2, 9)


def test_positions_of_a_language_model_inside_another() -> None:
    model, _ = families.build("llava", torch.float32)
    assert traits.max_positions(model) == model.config.text_config.max_position_embeddings
    model.config.text_config.max_position_embeddings = -1  # which means that there is no bound
    assert traits.max_positions(model) is None


def test_models_of_raw_sound(manifest: Path) -> None:
    model, _ = families.build("wav2vec2", torch.float32)
    extractor = t.Wav2Vec2FeatureExtractor(sampling_rate=8000)
    batches = data.calibration_batches(manifest, model, processor=extractor, split="test")
    assert all(batch.keys() == {"input_values"} and batch["input_values"].shape[0] == 1 for batch in batches)
    model(**batches[0])


def test_a_clip_too_short_for_the_model_is_named(manifest: Path) -> None:
    soundfile.write(manifest.with_name("b.flac"), np.zeros(5), 8000)
    model, _ = families.build("wav2vec2", torch.float32)
    extractor = t.Wav2Vec2FeatureExtractor(sampling_rate=8000)
    with pytest.raises(CloverError, match=r"the clip of 'two' in .*m\.tsv is too short for the model"):
        data.calibration_batches(manifest, model, processor=extractor)


def test_what_only_hears_needs_no_tokenizer(manifest: Path, tmp_path: Path) -> None:
    model, _ = families.build("hubert", torch.float32)
    for thing in (model, t.Wav2Vec2FeatureExtractor(sampling_rate=8000)):
        thing.save_pretrained(tmp_path / "hubert")
    (batch,) = data.calibration_batches(manifest, clover.load(tmp_path / "hubert"))
    assert batch.keys() == {"input_values"}


def test_speech_is_teacher_forced(manifest: Path) -> None:
    processor, model = whisper_processor(), t.WhisperForConditionalGeneration(whisper_config()).half()
    (batch,) = data.calibration_batches(manifest, model, processor=processor)
    assert batch["input_features"].shape == (1, 8, 200) and batch["input_features"].dtype == torch.float16
    ids = batch["decoder_input_ids"][0]
    assert ids[:4].tolist() == processor.tokenizer.convert_tokens_to_ids(SPECIAL[1:])
    assert processor.tokenizer.decode(ids[4:]) == " two"
    assert len(data.calibration_batches(manifest, model, processor=processor, split="test", joined=0)) == 2
    assert len(data.calibration_batches(manifest, model, processor=processor, split="test", limit=1)) == 1
    model.float()(**data.calibration_batches(manifest, model, processor=processor)[0])


def test_clips_are_joined_until_a_window_is_full(manifest: Path) -> None:
    """Twice by default, in another order; a clip more than fits begins the next window."""
    manifest.write_text("file\ttext\na.wav\tone\nc.ogg\tthree\nb.flac\ttwo\n")
    processor, model = whisper_processor(), t.WhisperForConditionalGeneration(whisper_config())
    both, last = data.calibration_batches(manifest, model, processor=processor)
    assert both["input_features"].shape == (2, 8, 200) and last["input_features"].shape == (1, 8, 200)
    said = [processor.tokenizer.decode(ids[4:]) for ids in both["decoder_input_ids"]]
    assert said == [" one three", " three one"]
    alone = data.calibration_batches(manifest, model, processor=processor, joined=0)
    assert [len(b["input_features"]) for b in alone] == [1, 1, 1]
    sound = [files.read_audio(manifest.with_name(name), 16000) for name in ("c.ogg", "a.wav")]
    heard = processor.feature_extractor(np.concatenate(sound), sampling_rate=16000, return_tensors="pt")
    torch.testing.assert_close(both["input_features"][1:], heard["input_features"])
    (once, _) = data.calibration_batches(manifest, model, processor=processor, joined=1)
    torch.testing.assert_close(once["input_features"], both["input_features"][:1])


def test_where_a_loss_is_measured_clips_are_heard_one_by_one(manifest: Path, tmp_path: Path) -> None:
    for thing in (t.WhisperForConditionalGeneration(whisper_config()), whisper_processor()):
        thing.save_pretrained(tmp_path / "whisper")
    model = clover.load(tmp_path / "whisper")
    for spare, sizes in ((False, [2]), (True, [1, 1])):
        batches = batches_of(model, manifest, "activations", "test", None, spare=spare)
        assert batches is not None and [len(b["input_features"]) for b in batches] == sizes


def test_english_only_speech_model_and_long_text(manifest: Path) -> None:
    manifest.write_text(f"file\ttext\na.wav\t{'long ' * 20}\nc.ogg\tthree\n")  # without splits every row counts
    processor, model = whisper_processor(), t.WhisperForConditionalGeneration(whisper_config())
    model.generation_config.is_multilingual = False
    first, second = data.calibration_batches(manifest, model, processor=processor, joined=0)
    start = processor.tokenizer.convert_tokens_to_ids([SPECIAL[1], SPECIAL[4]])
    assert second["decoder_input_ids"].tolist() == [
        start + processor.tokenizer(" three", add_special_tokens=False).input_ids
    ]
    assert first["decoder_input_ids"].shape == (1, 24)


def test_audio_encoder_alone_gets_no_text(manifest: Path) -> None:
    model = t.WhisperForConditionalGeneration(whisper_config()).get_encoder()
    (batch,) = data.calibration_batches(manifest, model, processor=whisper_processor())
    assert set(batch) == {"input_features"}
    model(**batch)


def test_clip_longer_than_the_model_hears_is_refused(manifest: Path) -> None:
    soundfile.write(manifest.with_name("b.flac"), np.zeros(16001 * 2), 16000)
    with pytest.raises(CloverError, match=r"b\.flac.* 2 s"):
        data.calibration_batches(manifest, t.WhisperModel(whisper_config()), processor=whisper_processor())


def test_images(pictures: Path) -> None:
    size = {"height": 16, "width": 16}
    model = t.ViTModel(t.ViTConfig(image_size=16, patch_size=8, **TINY))
    batches = data.calibration_batches(pictures, model, processor=t.ViTImageProcessorPil(size=size), batch=2)
    assert [b["pixel_values"].shape for b in batches] == [(2, 3, 16, 16), (1, 3, 16, 16)]
    model(**batches[0])


def test_images_of_many_shapes_come_with_what_is_known_of_them(pictures: Path) -> None:
    config = t.Siglip2VisionConfig(num_patches=16, patch_size=4, **TINY)
    model = t.Siglip2VisionModel(config).eval()
    images = t.Siglip2ImageProcessorPil(patch_size=4, max_num_patches=20)
    (batch,) = data.calibration_batches(pictures, model, processor=images)
    assert batch.keys() == {"pixel_values", "pixel_attention_mask", "spatial_shapes"}
    clover.prune(model, vo=0.3, calibration=[batch])
    assert model(**batch).last_hidden_state.isfinite().all()


def test_images_for_two_towers_come_with_a_prompt(pictures: Path, tmp_path: Path) -> None:
    model = clip()
    images = t.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    for thing in (model, images, tokenizer()):  # found where the model came from
        thing.save_pretrained(tmp_path / "clip")
    model = t.CLIPModel.from_pretrained(tmp_path / "clip")
    (batch,) = data.calibration_batches(pictures, model)
    assert batch["pixel_values"].shape == (3, 3, 16, 16) and batch["input_ids"].shape == (3, 2)
    assert model(**batch).logits_per_image.shape == (3, 3)


@pytest.mark.parametrize("too_large", [False, True])
def test_corrupt_image_is_named(pictures: Path, too_large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if too_large:
        monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 8)
    else:
        (pictures / "b.jpg").write_bytes(b"no picture")
    with pytest.raises(CloverError, match=r"image .* cannot be decoded" if too_large else r"b\.jpg"):
        data.calibration_batches(pictures, clip().vision_model, processor=t.CLIPImageProcessorPil())


@pytest.mark.parametrize("reads, model", [
    ("text", llama), ("manifest", lambda: t.WhisperModel(whisper_config())), ("images", lambda: clip().vision_model)
])  # fmt: skip
def test_kind_that_the_model_does_not_read(tmp_path: Path, reads: str, model: Callable[[], Any]) -> None:
    paths = {"text": tmp_path / "a.txt", "manifest": tmp_path / "a.tsv", "images": tmp_path}
    for kind in paths.keys() - {reads}:
        if kind != "images":
            paths[kind].touch()
        with pytest.raises(CloverError, match=f"{paths[kind].name} holds {kind}, but .* reads {reads}"):
            data.calibration_batches(paths[kind], model())


@pytest.mark.parametrize(
    "content, said",
    [("", "holds no text"), ("  \n", "holds no text"), ("w1", "is no calibration data: .* too little text")],
)
def test_empty_calibration_text(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(CloverError, match=rf"a\.txt {said}"):
        data.calibration_batches(tmp_path / "a.txt", llama(), processor=tokenizer())


def test_a_tokenizer_of_a_larger_model(tmp_path: Path) -> None:
    small = t.LlamaForCausalLM(t.LlamaConfig(vocab_size=20, max_position_embeddings=64, **TINY))
    with pytest.raises(CloverError, match=r"the tokenizer gives token \d+, but the model knows 20; take"):
        data.calibration_batches(text_file(tmp_path, 99), small, processor=tokenizer())


@pytest.mark.parametrize("options", [{"limit": 0}, {"sequences": 0}, {"length": 1}, {"batch": -1}, {"joined": -1}])
def test_counts_must_be_positive(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(CloverError, match="must be positive"):
        data.calibration_batches(text_file(tmp_path, 9), llama(), processor=tokenizer(), **options)


def test_model_without_a_tokenizer(tmp_path: Path) -> None:
    path = text_file(tmp_path, 9)
    with pytest.raises(CloverError, match="pass its tokenizer"):
        data.calibration_batches(path, llama())
    llama().save_pretrained(tmp_path / "model")
    with pytest.raises(CloverError, match="no tokenizer can be loaded from"):
        data.calibration_batches(path, t.LlamaForCausalLM.from_pretrained(tmp_path / "model"))


def writer(kind: str = "VisionEncoderDecoder") -> Any:
    """A tower in front of a GPT-2 that writes what it saw."""
    told = t.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=12, bos_token_id=1, eos_token_id=2)
    seen = t.ViTConfig(image_size=16, patch_size=8, **TINY)
    config = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(seen, told)
    return t.VisionEncoderDecoderModel(config).eval()


def pruned_in_all_parts(model: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    clover.prune(model, vo=0.25, calibration=batches)
    assert {block.part for block in clover.plan_of(model).blocks} == {"encoder", "decoder", "cross"}
    assert clover.summary(model)["vo_removed"] >= 0.25


def test_a_model_that_is_given_images_alone_writes_about_them(pictures: Path) -> None:
    model, images = writer(), t.ViTImageProcessorPil(size={"height": 16, "width": 16})
    batches = data.calibration_batches(pictures, model, processor=images, batch=2)
    assert [b["decoder_input_ids"].shape for b in batches] == [(2, 12), (1, 12)]  # all its positions
    assert all(set(b["decoder_input_ids"][:, 0].tolist()) == {1} for b in batches)
    pruned_in_all_parts(model, batches)
    with torch.device("meta"):
        empty = writer()
    with pytest.raises(
        CloverError, match=r"VisionEncoderDecoderModel must write about the images .*; calibrate it in m"
    ):
        data.calibration_batches(pictures, empty, processor=images)


def test_a_listener_and_a_writer_from_a_folder_without_a_whole_processor(manifest: Path, tmp_path: Path) -> None:
    sound, _ = families.build("wav2vec2", torch.float32)
    says = t.GPT2Config(**writer().config.decoder.to_diff_dict() | {"add_cross_attention": True})
    made = t.SpeechEncoderDecoderModel(encoder=sound, decoder=t.GPT2LMHeadModel(says))
    extractor = t.Wav2Vec2FeatureExtractor(sampling_rate=8000)
    with pytest.raises(CloverError, match="does not say where it was loaded from; pass its tokenizer or processor"):
        data.calibration_batches(manifest, made, processor=extractor)
    for thing in (made, tokenizer(), extractor):
        thing.save_pretrained(tmp_path / "model")
    model = t.SpeechEncoderDecoderModel.from_pretrained(tmp_path / "model")
    manifest.write_text(f"file\ttext\na.wav\t{' '.join(WORDS)}\n")
    batches = data.calibration_batches(manifest, model)
    assert [b["decoder_input_ids"].shape for b in batches] == [(1, 12)]
    pruned_in_all_parts(model, batches)


def test_an_encoder_that_tells_lengths_in_pairs(manifest: Path) -> None:
    model, _ = families.build("qwen2-audio", torch.float32)
    (batch,) = data.calibration_batches(manifest, model, processor=whisper_processor())
    assert batch.keys() == {"input_features"}


def test_a_model_that_writes_about_images_alone_needs_batches_with_them(tmp_path: Path) -> None:
    model, _ = families.build("blip", torch.float32)
    batches = data.calibration_batches(text_file(tmp_path, 99), model, processor=tokenizer())
    with pytest.raises(CloverError, match="BlipForConditionalGeneration needs pixel_values, too; give batches of"):
        clover.prune(model, vo=0.3, calibration=batches)


def test_a_decoder_that_reads_codes_of_sound_is_given_no_text(tmp_path: Path) -> None:
    hears = t.EncodecConfig(num_filters=4, hidden_size=8, codebook_size=16, codebook_dim=8, upsampling_ratios=[2, 2])
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    reads = families.build("t5", torch.float32)[0].config
    config = t.MusicgenConfig(
        text_encoder=reads.to_dict(), audio_encoder=hears.to_dict(), decoder=sizes | {"num_codebooks": 2}
    )
    with pytest.raises(CloverError, match="MusicgenForConditionalGeneration reads 16 tokens of its own; give batches"):
        data.calibration_batches(
            text_file(tmp_path, 99), t.MusicgenForConditionalGeneration(config), processor=tokenizer()
        )


def test_two_encoders_in_one_model_have_a_bound_each(tmp_path: Path) -> None:
    reads, says = (t.BertConfig(vocab_size=60, max_position_embeddings=n, pad_token_id=0, **TINY) for n in (34, 20))
    model = t.EncoderDecoderModel(config=t.EncoderDecoderConfig.from_encoder_decoder_configs(reads, says)).eval()
    path = text_file(tmp_path, 200)
    with pytest.raises(CloverError, match=r"the model names no decoder_start_token_id; set it in config\.json"):
        data.calibration_batches(path, model, processor=tokenizer(brackets=True))
    model.config.decoder_start_token_id = 2
    batches = data.calibration_batches(path, model, processor=tokenizer(brackets=True))
    assert {v.shape for b in batches for v in b.values()} == {(4, 20), (len(batches[-1]["input_ids"]), 20)}
    pruned_in_all_parts(model, batches)


def test_a_tokenizer_goes_with_what_reads_images(tmp_path: Path) -> None:
    for thing in (writer(), tokenizer(), t.ViTImageProcessorPil(size={"height": 16, "width": 16})):
        thing.save_pretrained(tmp_path)
    text, images = data.found_beside(str(tmp_path))
    assert isinstance(text, t.PreTrainedTokenizerBase) and isinstance(images, t.ViTImageProcessorPil)
    whisper_processor().save_pretrained(tmp_path / "whole")
    whisper_config().save_pretrained(tmp_path / "whole")
    (whole,) = data.found_beside(str(tmp_path / "whole"))
    assert isinstance(whole, t.WhisperProcessor)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_what_reads_images_and_cannot_be_loaded_is_named(file: str, tmp_path: Path) -> None:
    for thing in (writer(), tokenizer()):
        thing.save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps({"processor_class": "SmolVLMProcessor", "image_processor_type": "Gone"}))
    with pytest.warns(UserWarning, match=f"^{file} is not saved with the model, copy it by hand: no .* can be loaded"):
        (text,) = data.found_beside(str(tmp_path))
    assert isinstance(text, t.PreTrainedTokenizerBase)


def test_a_broken_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    for thing in (llama(), tokenizer()):
        thing.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    del content["model"]["vocab"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        CloverError, match=r"no tokenizer can be loaded from .*vocab.*; copy the original model's there"
    ):
        data.load_processor(tmp_path, "AutoTokenizer")


def test_a_tokenizer_that_lacks_a_token_of_its_processor(tmp_path: Path) -> None:
    model, _ = families.build("gemma3-image", torch.float32)
    for thing in (model, tokenizer(), t.Gemma3ImageProcessorPil()):
        thing.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text()) | {"processor_class": "Gemma3Processor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CloverError, match=r"no processor can be loaded from .*boi_token_id"):
        data.load_processor(tmp_path, "AutoProcessor")
    assert len(data.found_beside(str(tmp_path))) == 2


def test_processor_without_a_vocabulary(tmp_path: Path) -> None:
    whisper_processor().feature_extractor.save_pretrained(tmp_path)
    whisper_config().save_pretrained(tmp_path)
    with pytest.raises(CloverError, match="holds no tokenizer files"):
        data.load_processor(tmp_path, "AutoProcessor")


def test_every_real_question_is_understood(commonsense: Path) -> None:
    for path in sorted(commonsense.glob("[bopw]*.test.jsonl.gz")):  # one of each template that is quick to read
        questions = files.read_questions(path)
        assert all(q.stem and all(q.texts) and len(q.texts) == len(q.labels) for q in questions), path
        assert path.name.startswith("boolq") or all(q.texts != q.labels for q in questions), path


def test_real_speech(whisper: Path, speech: Path) -> None:
    model = t.WhisperForConditionalGeneration.from_pretrained(whisper)
    (batch,) = data.calibration_batches(speech / "manifest.tsv", model, limit=1)
    assert batch["input_features"].shape == (1, 80, 3000)
    assert batch["decoder_input_ids"][0, :4].tolist() == [50258, 50259, 50359, 50363]


def test_real_text(minilm: Path, wikitext2: Path) -> None:
    batches = data.calibration_batches(wikitext2 / "test.txt.gz", t.BertModel.from_pretrained(minilm))
    assert [b["input_ids"].shape for b in batches] == [(4, 512)] * 4


@pytest.mark.parametrize("long", [True, False])
def test_a_tokenizer_in_plain_python_gives_all_windows(tmp_path: Path, long: bool) -> None:
    """transformers' own hand back what overflows in another way than those in Rust, or not at all."""
    text, path = "abcdefgh" * (4000 if long else 20), tmp_path / "text.txt"
    path.write_text(text)
    model = t.T5ForConditionalGeneration(t.T5Config(vocab_size=384, d_model=16, num_layers=1, num_heads=2, d_ff=16))
    model.config.decoder_start_token_id = 0
    batches = data.calibration_batches(path, model, processor=t.ByT5Tokenizer(), sequences=6, length=32)
    rows = torch.cat([batch["input_ids"] for batch in batches])
    assert rows.shape == (6 if long else 5, 32)
    assert (rows[:, -1] == 1).all()  # the end of the sentence, as the tokenizer puts it


def test_of_a_long_text_no_more_is_taken_apart_than_is_wanted() -> None:
    words, read = tokenizer(), []

    class Watched:
        bos_token_id = words.bos_token_id

        def __call__(self, text: str, **options: Any) -> Any:
            read.append(len(text))
            return words(text, **options)

    text = "w1 w2 w3 " * 40_000
    whole, _ = data.text_tokens(text, words)
    some, _ = data.text_tokens(text, Watched(), 50)
    assert torch.equal(some[:50], whole[:50]) and max(read) < len(text) / 50
