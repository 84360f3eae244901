"""All stages in a row on a small data set, through the functions the command line calls; and what bad input gets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fuselip_core import stages
from fuselip_core.config import Settings, check_settings
from fuselip_core.data.tokens.store import TokenStore, gather
from fuselip_core.encoding.from_codes import TokenEncoder, encode_sides, prepare_sides
from fuselip_core.encoding.open import open_measuring
from fuselip_core.errors import FuselipError
from fuselip_core.model.embedder import Embedder
from fuselip_core.model.hub import load_pretrained
from fuselip_core.model.titok import TiTok
from fuselip_core.model.vocabulary import PAD, join
from fuselip_core.tracking.events import read_events
from fuselip_core.training.build import build_model
from fuselip_core.training.checkpoint import History


@pytest.fixture
def run(finished_run: Settings) -> Settings:
    return finished_run


def test_every_stage_leaves_what_the_next_one_reads(run: Settings) -> None:
    for name in ("prepared/manifest.json", "codebook/model.safetensors", "tokens/manifest.json", "history.jsonl"):
        assert (run.artifacts / name).is_file(), name
    for name in ("model/config.json", "model/model.safetensors", "report/index.html", "metrics.json"):
        assert (run.artifacts / name).is_file(), name
    # Its own checkpoints are gone, and those by which a run with other settings goes on are not.
    assert [path.name for path in (run.artifacts / "checkpoints").iterdir()] == ["interrupted-run"]
    assert not (run.artifacts / "work" / "codebook").exists()


def test_metrics_hold_measures_beside_chance_and_controls(run: Settings) -> None:
    metrics = json.loads((run.artifacts / "metrics.json").read_text())
    for direction in ("image_to_text", "text_to_image"):
        assert 0.0 <= metrics[f"retrieval/{direction}/recall_at_1"] <= 1.0
        assert 0.0 < metrics[f"retrieval/{direction}/chance_at_1"] < 0.2
        assert f"retrieval_shuffled/{direction}/recall_at_1" in metrics
    for query in ("fused", "question_only", "image_only", "blank_image", "shuffled_image", "majority"):
        assert f"answers/{query}/accuracy" in metrics
    assert metrics["train/steps"] == run.train.steps
    assert 0.0 < metrics["codebook/use"] <= 1.0


def test_history_has_both_losses_and_the_validation(run: Settings) -> None:
    lines = [json.loads(line) for line in (run.artifacts / "history.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if "loss" in line} >= {1, 10, 12}
    assert all(line["masked"] > 0 for line in lines if "loss" in line)
    assert all(0 < line["masked_share"] < 1 for line in lines if "loss" in line)
    assert [line["step"] for line in lines if any(name.startswith("valid/") for name in line)] == [6, 12]


def test_trackers_hear_of_the_machine_and_of_few_curves(run: Settings) -> None:
    events, _ = read_events(run.artifacts / "tracking" / "train" / "events.jsonl", 0)
    values = [event["values"] for event in events if event["type"] == "metrics"]
    of_steps = [metrics for metrics in values if "train/loss" in metrics]
    assert of_steps and all(metrics["system/memory_mb"] > 50 for metrics in of_steps)
    curves = {name for metrics in values for name in metrics if name.startswith("train/")}
    assert {"train/loss", "train/learning_rate", "train/pairs_per_second"} <= curves and len(curves) < 16
    stated = [event["values"] for event in events if event["type"] == "params"]
    assert stated and str(run.artifacts) not in json.dumps(stated)


def test_registered_version_embeds_like_the_saved_model(run: Settings) -> None:
    registered = json.loads((run.artifacts / "registered.json").read_text())
    assert registered["version"] == 1
    vectors = Embedder.from_pretrained(run.artifacts / "model", "cpu").embed(texts=["left", "right"])
    assert vectors.shape == (2, 128)


def test_a_registered_model_is_loaded_by_its_address(
    run: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the registry that the environment names, whichever this process used before."""
    import mlflow

    from fuselip_core import Embedder as FrontDoor

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'other.db'}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{run.artifacts.parent / 'mlflow.db'}")
    registered = FrontDoor.from_pretrained("models:/fuselip-sample-tiny/1", "cpu").embed(texts=["left"])
    assert np.array_equal(registered, Embedder.from_pretrained(run.artifacts / "model", "cpu").embed(texts=["left"]))
    with pytest.raises(FuselipError, match="has no models:/fuselip-sample-tiny/7"):
        FrontDoor.from_pretrained("models:/fuselip-sample-tiny/7")


def test_stored_tokens_give_what_the_published_call_gives(run: Settings) -> None:
    """The fast path (codes made once) equals the reference path (pixels through the tokenizer) for view 0."""
    from fuselip_core.data.shards.reader import PreparedData
    from fuselip_core.images import decode

    model, processor = load_pretrained(run.artifacts / "model", "cpu")
    store = TokenStore(run.artifacts / "tokens", "test")
    rows = store.rows_of("vqa")[:4]
    fast = TokenEncoder(model, torch.device("cpu")).encode(gather(store, rows, "query"))
    blobs = next(PreparedData(run.artifacts / "prepared").iter_images("test", columns=["bytes"]))["bytes"].to_pylist()
    images = [decode(blobs[row]) for row in store.pairs.query_image[rows]]
    texts = store.texts_of(store.pairs.query_text[rows])
    slow = Embedder(model, processor).embed(images=images, texts=texts)
    torch.testing.assert_close(torch.from_numpy(fast), torch.from_numpy(slow), atol=1e-6, rtol=0)


def test_tokenizing_in_every_step_gives_the_same_batches_for_view_0(run: Settings) -> None:
    """What a batch out of the store holds is what its images and strings give when they are tokenized for it."""
    from fuselip_core.data.shards.reader import PreparedData
    from fuselip_core.images import decode

    model, processor = load_pretrained(run.artifacts / "model", "cpu")
    store = TokenStore(run.artifacts / "tokens", "train")
    rows = np.concatenate([store.rows_of("caption")[5:9], store.rows_of("vqa")[7:12]])
    batch = prepare_sides(model, [gather(store, rows, side) for side in ("query", "target")])
    table = PreparedData(run.artifacts / "prepared").iter_images("train", columns=["bytes"])
    blobs = [blob for part in table for blob in part["bytes"].to_pylist()]
    sides = [(side, row) for side in ("query", "target") for row in rows]
    for place, (side, row) in zip(batch.places.tolist(), sides, strict=True):
        image = getattr(store.pairs, f"{side}_image")[row]
        text = getattr(store.pairs, f"{side}_text")[row]
        codes = ids = None
        if image >= 0:
            pixels = processor.image_processor(decode(blobs[image]))
            codes = model.tokenize_image(pixels[None])
        if text >= 0:
            ids = processor.text_tokenizer(store.texts_of(np.array([text])))
        expected = join(codes, ids, model.config.context_length)[0]
        start, end = batch.layout.boundaries[place : place + 2].tolist()
        assert batch.ids[start:end].tolist() == expected[expected != PAD].tolist()


def test_sides_with_and_without_image_keep_their_rows(run: Settings) -> None:
    """A mixed side equals its rows embedded one by one, padding or not."""
    model, _ = load_pretrained(run.artifacts / "model", "cpu")
    store = TokenStore(run.artifacts / "tokens", "train")
    pairs = torch.arange(6).numpy()
    target, query = gather(store, pairs, "target"), gather(store, pairs, "query")
    assert target.has_image.tolist() != query.has_image.tolist()
    with torch.no_grad():
        whole = encode_sides(model, [query, target], torch.device("cpu"))
        for side, embeddings in zip((query, target), whole, strict=True):
            single = [encode_sides(model, [side.part(slice(i, i + 1))], torch.device("cpu"))[0] for i in range(6)]
            torch.testing.assert_close(embeddings, torch.cat(single), atol=1e-6, rtol=0)


def test_a_loss_that_is_not_finite_ends_the_run_with_step_and_samples(run: Settings, tmp_path: Path) -> None:
    from fuselip_core.encoding.from_codes import TokenPairs
    from fuselip_core.training.checkpoint import Checkpoints
    from fuselip_core.training.loop import Trainer

    model, _ = load_pretrained(run.artifacts / "model", "cpu")
    model.ln_final.weight.data.fill_(float("nan"))
    store = TokenStore(run.artifacts / "tokens", "train")
    encoder = TokenPairs(model, store, 0.0)
    with pytest.raises(FuselipError, match=r"the loss is nan at step 0 \(pairs ROCOv2_2023_train_0000\d\d/(caption|q)"):
        Trainer(encoder, store, run.train, Checkpoints(tmp_path), lambda metrics, step: None).run()


def test_evaluation_sets_are_asked_as_well(run: Settings, tmp_path: Path) -> None:
    from training_data import write_sugarcrepe

    from fuselip_core.data.prepare.prepare import prepare_data

    write_sugarcrepe(tmp_path / "crepe")
    asked = check_settings({"prepare": {"source": "sugarcrepe", "root": tmp_path / "crepe"}}, origin="test").prepare
    prepare_data(asked, tmp_path / "prepared-crepe")
    for name in ("prepared", "tokens", "codebook", "model", "history.jsonl"):
        (tmp_path / name).symlink_to(run.artifacts / name)
    evaluate = run.evaluate.model_copy(update={"candidates": (tmp_path / "prepared-crepe",)})
    metrics = stages.evaluate(run.model_copy(update={"artifacts": tmp_path, "evaluate": evaluate}))
    assert metrics["candidates/sugarcrepe/add_att/questions"] == 4
    assert metrics["candidates/sugarcrepe/mean_chance"] == 0.5
    before, after = (json.loads((place / "metrics.json").read_text()) for place in (run.artifacts, tmp_path))
    assert before.items() <= after.items(), "the measures of the run's own data stay as they were"
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "Evaluation sets" in page and "sugarcrepe/add_att" in page
    wrong = run.evaluate.model_copy(update={"candidates": (tmp_path / "crepe",)})
    with pytest.raises(FuselipError, match="holds no prepared data"):
        stages.evaluate(run.model_copy(update={"artifacts": tmp_path, "evaluate": wrong}))


def test_a_split_that_the_data_lack_gives_way_to_valid(
    run: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("prepared", "tokens", "codebook", "model", "history.jsonl"):
        (tmp_path / name).symlink_to(run.artifacts / name)
    evaluate = run.evaluate.model_copy(update={"split": "dev"})
    stages.evaluate(run.model_copy(update={"artifacts": tmp_path, "evaluate": evaluate}))
    assert "no dev split: evaluating valid instead" in caplog.text
    assert json.loads((tmp_path / "report" / "results.json").read_text())["split"] == "valid"


def test_everything_is_opened_before_anything_is_measured(
    run: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fuselip_core.data.pair import DataError
    from fuselip_core.evaluation import tasks

    def measured(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(tasks, "evaluate", measured)
    with pytest.raises(AssertionError, match="measured"):
        stages.evaluate(run)
    for name in ("prepared", "tokens", "codebook"):
        (tmp_path / name).symlink_to(run.artifacts / name)
    shutil.copytree(run.artifacts / "model", tmp_path / "model")
    wrong = run.evaluate.model_copy(update={"candidates": (tmp_path / "nowhere",)})
    with pytest.raises(DataError, match="nowhere"):
        stages.evaluate(run.model_copy(update={"artifacts": tmp_path, "evaluate": wrong}))
    (tmp_path / "model" / "started_from.json").write_text(json.dumps({"init": str(run.artifacts / "model")}))
    wrong = run.evaluate.model_copy(update={"retention": tmp_path / "nowhere"})
    with pytest.raises(FuselipError, match="nowhere"):
        stages.evaluate(run.model_copy(update={"artifacts": tmp_path, "evaluate": wrong}))


def test_codes_of_another_tokenizer_do_not_train(run: Settings, tmp_path: Path) -> None:
    for name in ("prepared", "tokens"):
        (tmp_path / name).symlink_to(run.artifacts / name)
    other = check_settings({"artifacts": tmp_path, "codebook": {"steps": 1, "seed": 5, "batch_size": 4}}, origin="test")
    stages.codebook(other)
    with pytest.raises(FuselipError, match="another tokenizer"):
        stages.train(other)


def test_an_adapted_model_is_looked_at_with_the_codes_it_trains_on(run: Settings, tmp_path: Path) -> None:
    """A codebook that was fine-tuned takes the place of the tokenizer that the checkpoint came with."""
    (tmp_path / "prepared").symlink_to(run.artifacts / "prepared")
    init = str(run.artifacts / "model")
    fields = run.model_dump(by_alias=True)
    fields |= {"artifacts": tmp_path, "train": {**fields["train"], "init": init, "steps": 2}}
    fields["codebook"] |= {"init": init, "steps": 2, "learning_rate": 0.05}
    adapted = check_settings(fields, origin="test")
    measured = stages.codebook(adapted)
    # The checkpoint has no decoder: before, there is no reconstruction that could be measured.
    assert "codebook/before/use" in measured and "codebook/before/psnr" not in measured
    assert "codebook/psnr" in measured and (tmp_path / "codebook" / "reconstructions.png").is_file()
    stages.tokenize(adapted)
    tokenizer = TiTok.load(tmp_path / "codebook")
    model = build_model(adapted.model, adapted.train, tokenizer)
    assert all(
        torch.equal(model.image_tokenizer.model.state_dict()[name], value)
        for name, value in tokenizer.state_dict().items()
    )
    store, _ = open_measuring(model, tmp_path, "valid", torch.device("cpu"))
    stored = TokenStore(tmp_path / "tokens", "valid")
    assert (store.codes == stored.codes).all()
    assert (stored.codes != TokenStore(run.artifacts / "tokens", "valid").codes).any(), "else this would show nothing"


def test_a_tokenizer_without_a_trained_decoder_gets_no_reconstruction_error(run: Settings, tmp_path: Path) -> None:
    """As in the recipes that take a published tokenizer as it is: a decoder as it was drawn shows nothing."""
    (tmp_path / "prepared").symlink_to(run.artifacts / "prepared")
    fields = run.model_dump(by_alias=True) | {"artifacts": tmp_path}
    fields["codebook"] |= {"init": str(run.artifacts / "model"), "steps": 0}
    measured = stages.codebook(check_settings(fields, origin="test"))
    assert set(measured) == {"codebook/use", "codebook/perplexity"}
    assert not (tmp_path / "codebook" / "reconstructions.png").exists()
    assert json.loads((tmp_path / "codebook" / "codebook.json").read_text()) == measured


def test_codes_of_other_data_are_not_measured(run: Settings, tmp_path: Path) -> None:
    for name in ("tokens", "codebook", "model", "history.jsonl"):
        (tmp_path / name).symlink_to(run.artifacts / name)
    shutil.copytree(run.artifacts / "prepared", tmp_path / "prepared")
    manifest = json.loads((tmp_path / "prepared" / "manifest.json").read_text())
    (tmp_path / "prepared" / "manifest.json").write_text(json.dumps(manifest | {"data_version": "another"}))
    with pytest.raises(FuselipError, match="is not what was tokenized; run the tokenize stage again"):
        stages.evaluate(run.model_copy(update={"artifacts": tmp_path}))


def test_damaged_metrics_are_not_registered(run: Settings, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(run.artifacts / "model")
    for content in ("[]", "{}", '{"a": "b"}', '{"a": 0.5'):
        (tmp_path / "metrics.json").write_text(content)
        with pytest.raises(FuselipError, match=r"metrics\.json is damaged .*run the stage that writes it again"):
            stages.register(run.model_copy(update={"artifacts": tmp_path}))


def test_metrics_of_another_training_are_not_registered(run: Settings, tmp_path: Path) -> None:
    """Trained again and not measured: the gates would be passed by the model before."""
    shutil.copytree(run.artifacts / "model", tmp_path / "model")
    shutil.copy(run.artifacts / "metrics.json", tmp_path)
    trained = json.loads((tmp_path / "model" / "training.json").read_text())
    (tmp_path / "model" / "training.json").write_text(json.dumps(trained | {"train/seconds": 1e6}))
    with pytest.raises(
        FuselipError, match=r"metrics\.json belongs to another training than .*run the evaluate stage again"
    ):
        stages.register(run.model_copy(update={"artifacts": tmp_path}))


def test_a_run_does_not_start_from_the_folder_that_it_writes(run: Settings) -> None:
    train = run.train.model_copy(update={"init": str(run.artifacts / "codebook" / ".." / "model")})
    with pytest.raises(FuselipError, match="is where this run saves its own model; copy that folder elsewhere"):
        stages.train(run.model_copy(update={"train": train}))


def test_the_history_of_a_killed_run_loses_half_a_line(tmp_path: Path) -> None:
    class Resumed:
        def latest(self) -> tuple[int, dict[str, int]]:
            return 20, {}

    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 10, "loss": 1.0}\n{"step": 30, "loss": 0.5}\n{"step": 2')
    History(path, Resumed()).add(21, {"loss": 0.7})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 21]


def test_a_stage_without_its_input_says_which_one_is_missing(tmp_path: Path) -> None:
    settings = check_settings({"artifacts": tmp_path / "none"}, origin="test")
    for stage, word in ((stages.codebook, "prepare"), (stages.train, "tokenize"), (stages.evaluate, "train")):
        with pytest.raises(FuselipError, match=word):
            stage(settings)
