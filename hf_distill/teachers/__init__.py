"""Where the teacher's signals come from. A teacher is anything that turns inputs into a `TeacherOutput`."""

from hf_distill.signals import SparseLogits, TeacherOutput
from hf_distill.teachers.base import FactoredTeacher, RecordingTeacher, SparseTeacher, Teacher, takes_factored
from hf_distill.teachers.loading import load_student, load_teacher
from hf_distill.teachers.local import AdapterOffTeacher, LocalTeacher, in_eval_mode
from hf_distill.teachers.sparse import TopKTeacher

__all__ = [
    "AdapterOffTeacher",
    "FactoredTeacher",
    "LocalTeacher",
    "RecordingTeacher",
    "SparseLogits",
    "SparseTeacher",
    "Teacher",
    "TeacherOutput",
    "TopKTeacher",
    "in_eval_mode",
    "load_student",
    "load_teacher",
    "takes_factored",
]
