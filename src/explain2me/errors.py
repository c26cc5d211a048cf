"""Every error that a user can cause, as a tree.

```
Explain2MeError            wrong config or file; the command line prints one line and exits with 2
├── ConfigError            the TOML file or a --set
│   └── DivergedError      a training whose loss or weights are no numbers any more
├── ManifestError          the list of images
├── CheckpointError        a weights file that does not fit its architecture, or that must not be loaded
├── LayerError             a layer that the model does not have, or that carries no spatial map
├── RunFolderError         a run folder that is missing, damaged, or of another config
│   └── BusyError          another process is writing into it
├── Stopped                Ctrl-C or SIGTERM; the command line exits with 130
└── ImageError             one image that cannot be used; a run puts it into the quarantine and continues
    └── MachineError       the machine fails to give an image that may be whole; a run stops, and continues later
```
A tensor of the wrong shape or type raises ``ValueError`` instead.
"""


class Explain2MeError(Exception):
    """Wrong config or file: what was expected, what came, and what to do; the command line prints it and exits with 2."""


class ConfigError(Explain2MeError):
    """The TOML file or a ``--set`` is wrong."""


class DivergedError(ConfigError):
    """The loss or the weights of a training are not finite any more."""


class ManifestError(Explain2MeError):
    """The list of images is wrong."""


class CheckpointError(Explain2MeError):
    """A weights file does not fit its architecture, or must not be loaded."""


class LayerError(Explain2MeError):
    """A layer is not in the model, or carries no spatial map."""


class RunFolderError(Explain2MeError):
    """A run folder is missing, damaged, or belongs to another config."""


class BusyError(RunFolderError):
    """Another process is writing into the same folder."""


class Stopped(Explain2MeError):
    """The user stopped a command; the message says what is kept."""


class ImageError(Explain2MeError):
    """One image cannot be used; a run puts it into the quarantine and continues.

    Args:
        kind: short machine-readable word, e.g. ``truncated``; see :mod:`explain2me.images.decode`.
        message: one line for people.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.kind, self.message)


class MachineError(ImageError):
    """The machine fails to give an image that may be whole: descriptors, memory, a lost disk, permissions; a run stops."""
