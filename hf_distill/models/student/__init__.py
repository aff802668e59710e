"""Students built from teachers: fewer layers, narrower, in another layout, with fewer tokens."""

from hf_distill.models.student.build import BuiltStudent, build_student
from hf_distill.models.student.report import Origin, StudentReport
from hf_distill.models.student.vocabulary import TrimmedVocabulary, trim_vocabulary

__all__ = ["BuiltStudent", "Origin", "StudentReport", "TrimmedVocabulary", "build_student", "trim_vocabulary"]
