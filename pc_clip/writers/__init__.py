"""What writes the sentences: rules over two captions, a language model, or a captioner of changes.

A writer gets pairs of captions and gives back raw sentences, one a pair; cleaning happens elsewhere. It
never sees an image, but for the writer server where a task has pictures to show, and for the writer change,
which gets the names of two images and looks at both.
"""

from pc_clip.writers.causal import LanguageModelConfig, LanguageModelWriter
from pc_clip.writers.change import ChangeWriter, ChangeWriterConfig, ToldWriter
from pc_clip.writers.job import Job, Writer
from pc_clip.writers.rules import RulesWriter
from pc_clip.writers.server import ServerConfig, ServerWriter

__all__ = [
    "ChangeWriter",
    "ChangeWriterConfig",
    "Job",
    "LanguageModelConfig",
    "LanguageModelWriter",
    "RulesWriter",
    "ServerConfig",
    "ServerWriter",
    "ToldWriter",
    "Writer",
]  # fmt: skip
