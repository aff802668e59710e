"""What works without the student's logits, and what is decided anew for a new student."""

import pytest
import torch
import transformers as hf

from tests.tiny import llama, mixtral, pair
from tests.training import logged, make_trainer


class FusedHeadLlama(hf.LlamaForCausalLM):
    """Forms its loss and no logits in training, as with Liger's fused loss."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **options):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **options)
        return type(output)(loss=output.loss) if self.training and labels is not None else output


def test_the_task_alone_needs_no_logits(tmp_path):
    losses = []
    for student in (FusedHeadLlama(llama().config), llama()):
        student.load_state_dict(pair("llama")[0].state_dict())
        trainer = make_trainer(tmp_path, "llama", models=(student, None), task_weight=1.0, kd_weight=0.0)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


def test_the_logit_term_needs_them_and_says_so(tmp_path):
    student = FusedHeadLlama(llama().config)
    config = {"task": {"weight": 0.5}, "logits": {"temperature": {"policy": "flsw"}}}  # not formed from hidden states
    with pytest.raises(ValueError, match="holds no logits"):
        make_trainer(tmp_path, "llama", model=student, distillation_config=config).train()


def test_whether_terms_are_fused_is_decided_for_each_new_student(tmp_path):
    """Experts' auxiliary loss forbids it, which a first student without experts knows nothing of."""
    makers = [llama]

    def model_init():
        torch.manual_seed(0)
        return makers[-1]()

    trainer = make_trainer(tmp_path, "llama", model=None, model_init=model_init)
    trainer.train()
    makers.append(mixtral)
    trainer.train()
    alone = make_trainer(tmp_path, "llama", model=model_init())
    alone.train()
    second = logged(trainer, "loss_task")
    assert second == logged(alone, "loss_task")
