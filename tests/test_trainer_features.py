"""What `Trainer` does, `DistillationTrainer` does too, with a teacher beside it."""

import copy
import itertools
import pickle

import datasets
import pytest
import torch
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils.data import Dataset
from transformers import (
    TrainerCallback,
)

from tests.tiny import ZOO, pair, rows, tokenizer
from tests.training import (
    GradientRecorder,
    assert_same_gradients,
    batch_of,
    logged,
    losses,
    make_trainer,
    plain_trainer,
    values,
)


class MapStyle(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i]


CONTAINERS = {
    "list": values,
    "tensors": lambda data: data,
    "map-style": lambda data: MapStyle(values(data)),
    "Dataset": lambda data: datasets.Dataset.from_list(values(data)),
    "torch Dataset": lambda data: datasets.Dataset.from_list(values(data)).with_format("torch"),
    "stream": lambda data: datasets.IterableDataset.from_generator(lambda: iter(values(data))),
    "streamed Dataset": lambda data: datasets.Dataset.from_list(values(data)).to_iterable_dataset(),
}


@pytest.mark.parametrize("container", [*CONTAINERS])
def test_a_data_set_of_any_kind_gives_the_same_steps_and_evaluation(container, tmp_path):
    data = CONTAINERS[container](rows("sequence"))
    trainer = make_trainer(tmp_path, train_dataset=data, eval_dataset=data, max_steps=3)
    expected = make_trainer(tmp_path, max_steps=3)
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-6)
    metrics, wanted = trainer.evaluate(), expected.evaluate()
    for name in ("eval_loss", "eval_kd", "eval_agreement"):
        assert metrics[name] == pytest.approx(wanted[name], rel=1e-6), name


def test_a_transform_that_runs_when_rows_are_read_is_left_alone(tmp_path):
    data = rows("image")
    stored = datasets.Dataset.from_dict({"picture": list(range(8)), "label": [int(row["labels"]) for row in data]})
    stored.set_transform(
        lambda batch: {
            "pixel_values": [data[i]["pixel_values"] for i in batch["picture"]],
            "labels": [data[i]["labels"] for i in batch["picture"]],
        }
    )
    trainer = make_trainer(tmp_path, "vit", train_dataset=stored, remove_unused_columns=False)
    assert losses(trainer) == pytest.approx(losses(make_trainer(tmp_path, "vit")), rel=1e-6)


def test_a_stream_that_can_be_read_once_loses_no_row_before_training(tmp_path):
    class Once(torch.utils.data.IterableDataset):
        def __init__(self, data):
            self.rows = iter(data)

        def __iter__(self):
            return self.rows

    trainer = make_trainer(tmp_path, train_dataset=Once(rows("sequence")), max_steps=2)
    assert losses(trainer) == pytest.approx(losses(make_trainer(tmp_path, max_steps=2)), rel=1e-6)


def test_callbacks_see_the_terms_in_the_logs_and_the_weighted_terms_make_the_loss(tmp_path):
    class Watcher(TrainerCallback):
        def __init__(self):
            self.logs = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append(dict(logs))

    watcher = Watcher()
    trainer = make_trainer(tmp_path, callbacks=[watcher], max_steps=4, logging_steps=2, task_weight=0.3, kd_weight=2.0)
    trainer.train()
    steps = [entry for entry in watcher.logs if "loss" in entry]
    assert len(steps) == 2
    for entry in steps:
        assert entry["loss"] == pytest.approx(0.3 * entry["loss_task"] + 2.0 * entry["loss_kd"], rel=1e-6)
        assert entry["temperature"] == 2.0


@pytest.mark.parametrize(
    "name", ["bert", "bert-choices", "bert-tokens", "bert-masked", "llama", "gpt2", "t5", "bart", "vit"]
)
def test_label_smoothing_is_plain_trainers_without_a_teachers_weight(name, tmp_path):
    options = {"label_smoothing_factor": 0.2, "max_steps": 3}
    collator = None
    if name in ("t5", "bart"):  # plain Trainer needs the decoder's inputs in the batch

        def collator(features):
            return {**batch_of(features), **made_inputs(batch_of(features)["labels"])}

        def made_inputs(labels):
            return {"decoder_input_ids": pair(name)[0].prepare_decoder_input_ids_from_labels(labels)}

    ours = make_trainer(tmp_path, name, kd_weight=0.0, task_weight=1.0, data_collator=collator, **options)
    plain = plain_trainer(tmp_path, name, data_collator=collator, **options)
    expected = losses(plain)
    if name == "gpt2":  # Trainer divides by a count that includes position 0: transformers issue 47688
        batches = [batch_of(rows("causal")[i : i + 4])["labels"] for i in (0, 4, 0)]
        expected = [
            loss * (labels != -100).sum().item() / (labels[:, 1:] != -100).sum().item()
            for loss, labels in zip(expected, batches, strict=True)
        ][:1]
    assert losses(ours)[: len(expected)] == pytest.approx(expected, rel=1e-5)
    assert ours.evaluate()["eval_loss"] < make_trainer(tmp_path, name).evaluate()["eval_loss"] + 1


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_label_smoothing_needs_no_decoder_inputs_in_the_batch(name, tmp_path):
    options = {"kd_weight": 0.0, "task_weight": 1.0, "label_smoothing_factor": 0.2}
    student, _ = pair(name)
    batch = batch_of(rows(ZOO[name][1])[:4])
    labels = batch["labels"]
    log_probs = student.train()(**batch).logits.log_softmax(-1)
    real = labels != -100
    picked = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected = -(0.8 * picked + 0.2 * log_probs.mean(-1))[real].mean()
    trainer = make_trainer(tmp_path, name, max_steps=1, **options)
    assert losses(trainer) == pytest.approx([expected.item()], rel=1e-5)


def test_a_loss_function_of_the_users_takes_the_task_losss_place(tmp_path):
    def squared(outputs, labels, num_items_in_batch=None):
        target = torch.nn.functional.one_hot(labels, 3).float()
        return (outputs.logits - target).square().sum() / num_items_in_batch

    options = {"compute_loss_func": squared, "max_steps": 3, "gradient_accumulation_steps": 2}
    ours = make_trainer(tmp_path, kd_weight=0.0, task_weight=1.0, **options)
    del options["compute_loss_func"]
    plain = plain_trainer(tmp_path, compute_loss_func=squared, **options)
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-6)
    both = make_trainer(tmp_path, task_weight=1.0, compute_loss_func=squared, max_steps=1)
    both.train()
    assert logged(both, "loss_task")[0] == pytest.approx(
        squared(pair("bert")[0](**batch_of(rows("sequence")[:4])), batch_of(rows("sequence")[:4])["labels"], 4).item(),
        rel=1e-5,
    )
    assert logged(both, "loss_kd")[0] > 0


def test_a_loss_function_of_the_users_sees_a_heads_own_loss_where_there_are_no_labels(tmp_path):
    def own(outputs, labels, num_items_in_batch=None):
        assert labels is None
        return 3 * outputs.loss

    trainer = make_trainer(tmp_path, "bert-spans", compute_loss_func=own, max_steps=1)
    plain = make_trainer(tmp_path, "bert-spans", max_steps=1)
    trainer.train()
    plain.train()
    assert logged(trainer, "loss_task")[0] == pytest.approx(3 * logged(plain, "loss_task")[0], rel=1e-5)


def test_neftune_shakes_the_students_embeddings_and_not_the_teachers(tmp_path):
    student, teacher = pair("llama")
    before = copy.deepcopy(teacher.state_dict())
    trainer = make_trainer(tmp_path, "llama", models=(student, teacher), neftune_noise_alpha=20.0, max_steps=1)
    shaken = losses(trainer)[0]
    assert shaken != pytest.approx(losses(make_trainer(tmp_path, "llama", max_steps=1))[0], rel=1e-4)
    assert not teacher.get_input_embeddings()._forward_hooks
    assert not student.get_input_embeddings()._forward_hooks, "Trainer takes its hook off at the end"
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, "activation_checkpointing") for name in ("bert", "llama", "t5", "vit")]
    + [(name, "torch_compile") for name in ("bert", "llama")],
)
def test_checkpointed_and_compiled_students_have_the_same_gradients(name, option, tmp_path):
    def run(**options):
        # Accelerate keeps one state a process: a trainer must be done before the next one's arguments are made.
        recorder = GradientRecorder()
        trainer = make_trainer(tmp_path, name, callbacks=[recorder], **options)
        return trainer, recorder.steps, losses(trainer), trainer.evaluate()["eval_kd"]

    _, gradients, loss, kd = run()
    options = {"torch_compile_backend": "aot_eager"} if option == "torch_compile" else {}
    trainer, changed_gradients, changed_loss, changed_kd = run(**{option: True, **options})
    assert isinstance(trainer.model_wrapped, OptimizedModule) == (option == "torch_compile")
    assert trainer.model.is_activation_checkpointing == (option == "activation_checkpointing")
    assert changed_loss == pytest.approx(loss, rel=1e-5)
    assert changed_kd == pytest.approx(kd, rel=1e-4)
    for actual, expected in zip(changed_gradients, gradients, strict=True):
        assert_same_gradients({key.removeprefix("_orig_mod."): value for key, value in actual.items()}, expected)


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "llama", "whisper", "wav2vec2-ctc"])
def test_bf16_training_stays_near_float32(name, teacher_dtype, tmp_path):
    def run(dtype, **options):
        student, teacher = pair(name)
        trainer = make_trainer(tmp_path, name, models=(student, teacher.to(dtype)), **options)
        loss = losses(trainer)
        assert next(teacher.parameters()).dtype == dtype
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in student.parameters())
        return {
            "loss": loss,
            **{name: logged(trainer, name) for name in ("loss_kd", "loss_task")},
            "eval_kd": trainer.evaluate()["eval_kd"],
        }

    full, half = run(torch.float32), run(teacher_dtype, bf16=True)
    for key, value in full.items():
        assert half[key] == pytest.approx(value, rel=0.1), key
    assert half["loss_task"] != full["loss_task"], "autocast did nothing"


def test_tokens_seen_are_counted_as_plain_trainer_counts_them(tmp_path):
    options = {"include_num_input_tokens_seen": "non_padding", "max_steps": 2}
    ours = make_trainer(tmp_path, processing_class=tokenizer(), **options)
    plain = plain_trainer(tmp_path, processing_class=tokenizer(), **options)
    ours.train()
    plain.train()
    assert ours.state.num_input_tokens_seen == plain.state.num_input_tokens_seen > 0


def test_counts_can_stay_on_their_device(tmp_path):
    options = {"max_steps": 3, "gradient_accumulation_steps": 2}
    alone = make_trainer(tmp_path, average_tokens_across_devices=False, **options)
    assert losses(alone) == pytest.approx(losses(make_trainer(tmp_path, **options)), rel=1e-7)


def test_rows_can_be_grouped_by_length(tmp_path):
    data = values(rows("sequence", 16))
    for i, row in enumerate(data):
        for name in ("input_ids", "attention_mask"):
            row[name] = row[name][: 4 + i % 8]
    lengths = []

    class Watched:
        def __call__(self, features):
            lengths.append([len(row["input_ids"]) for row in features])
            return tokenizer().pad(features, return_tensors="pt")

    trainer = make_trainer(
        tmp_path, train_dataset=data, data_collator=Watched(), train_sampling_strategy="group_by_length", max_steps=4
    )
    assert len(losses(trainer)) == 4
    assert sorted(itertools.chain(*lengths)) == sorted(4 + i % 8 for i in range(16))
    assert max(max(batch) - min(batch) for batch in lengths) < 7, "a random batch of 4 spans nearly all lengths"


def test_an_optimizer_and_a_schedule_of_the_users_are_used(tmp_path):
    student, teacher = pair("bert")
    head = student.classifier.weight
    optimizer = torch.optim.SGD([head], lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    make_trainer(tmp_path, models=(student, teacher), optimizers=(optimizer, schedule)).train()
    changed = [name for name, value in student.named_parameters() if not torch.equal(value, before[name])]
    assert changed == ["classifier.weight"]


def test_the_collator_travels_to_a_data_loader_process(tmp_path):
    data = values(rows("sequence"))
    data[2]["labels"] = None
    options = {"train_dataset": data, "max_steps": 2}
    worker = make_trainer(tmp_path, dataloader_num_workers=1, **options)
    copied = pickle.loads(pickle.dumps(worker.data_collator))
    assert copied(data[:4])["label_mask"].tolist() == [True, True, False, True]
    assert losses(worker) == pytest.approx(losses(make_trainer(tmp_path, **options)), rel=1e-7)


def test_two_trainings_in_a_row_go_on_from_the_first(tmp_path):
    trainer = make_trainer(tmp_path)
    first = losses(trainer)
    trainer.args.temperature = 1.0
    second = losses(trainer)
    assert logged(trainer, "temperature") == [1.0, 1.0]
    assert first != second
