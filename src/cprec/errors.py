"""The few exceptions a caller may want to catch. Each message says what was wrong, the value got, and what to do."""


class CPRecError(Exception):
    """Base of every error that CPRec raises on purpose: the command line prints its message without a traceback."""


class ConfigError(CPRecError, ValueError):
    """A recipe, a YAML file or a `key=value` setting is wrong; the message names the field and what is accepted."""


class Unsuitable(ConfigError):
    """A recommender cannot be made of this data; the message says what it lacks. An evaluation goes on without it."""


class InputChanged(ConfigError):
    """An output folder was made from other input than the present one; the message names what changed."""


class DataError(CPRecError, ValueError):
    """Input data cannot be used; the message names the file, the column or the line."""


class LeakageError(CPRecError):
    """Held-out data reached training data, or no certificate shows that it did not."""


class ShardError(CPRecError):
    """A token shard is missing, incomplete or not the file that its manifest describes."""


class CheckpointError(CPRecError):
    """A checkpoint cannot be written or read; earlier complete checkpoints are untouched."""


class TrainingError(CPRecError):
    """Training cannot go on, as when a loss or gradient is not finite; the last checkpoint is intact."""


class ModelError(CPRecError):
    """A model gives scores that are not finite; the message names its folder."""


class UnknownItemError(CPRecError, KeyError):
    """An item id or title is not in the catalogue; the message lists the ids and the nearest ones known."""

    def __str__(self) -> str:  # KeyError would put the message in quotes
        return str(self.args[0]) if self.args else ""
