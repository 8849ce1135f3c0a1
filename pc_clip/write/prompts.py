"""What a language model is asked: templates in write/prompts/, one a task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from pc_clip.core.errors import UserError
from pc_clip.core.paths import package_data

FOLDER = package_data(Path(__file__).with_name("prompts"))


@dataclass(frozen=True)
class Prompt:
    """system: who the model is to be; instruction: the question, with {first} and {second}; examples: worked answers.

    The examples are shown to models without a chat template alone, which would otherwise not know what is wanted.
    """

    system: str
    instruction: str
    examples: tuple[dict[str, str], ...] = ()

    def question(self, first: str, second: str) -> str:
        filled = self.instruction.replace("{first}", "\0").replace("{second}", second.strip())
        return filled.replace("\0", first.strip())  # so that a caption with braces in it stays as it is

    def with_examples(self, first: str, second: str) -> str:
        """The question after the worked answers, as one text to continue."""
        asked = [self.question(e["first"], e.get("second", "")) + f"\nAnswer: {e['answer']}" for e in self.examples]
        return "\n\n".join([*asked, f"{self.question(first, second)}\nAnswer:"])


def read(path: str | Path) -> Prompt:
    """Raises UserError for a file that is absent or not a prompt."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        prompt = Prompt(content["system"], content["instruction"], tuple(content.get("examples", ())))
        prompt.with_examples("a", "b")
    except FileNotFoundError as error:
        raise UserError(f"no prompt at {path}; those that are there lie in {FOLDER}") from error
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a prompt ({' '.join(str(error).split())}); it needs system, instruction, and examples with "
            "first and answer"
        ) from error
    if "{first}" not in prompt.instruction:
        raise UserError(f"{path}: the instruction has no {{first}} where a caption belongs")
    return prompt
