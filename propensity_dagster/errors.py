"""The errors a user can meet. Nothing but exceptions belongs here.

PropensityError
├── ConfigError             a campaign file, a setting or a command line is wrong
├── SourceError             a source cannot be opened or read
├── DataContractError       data break what the campaign or a table promises
│   └── LeakageError        something would see what could not have been known
├── InsufficientDataError   too little history, too few converters
├── PlanError               the limits of a contact plan contradict each other
├── SavedModelError         a saved model is cut short, tampered with or unknown
├── EngineError             what computes ran out of memory or disk, or lost its executors
└── StorageError            the home folder cannot be written

Every message says what came, what was wanted, what is allowed, and where.
"""


class PropensityError(Exception):
    """Base of every error that is the user's to mend."""


class ConfigError(PropensityError):
    """A campaign file, a setting or a command line is wrong."""


class SourceError(PropensityError):
    """A source cannot be opened or read."""


class DataContractError(PropensityError):
    """Data break what the campaign or a table promises."""


class LeakageError(DataContractError):
    """Something would see what could not have been known at the time."""


class InsufficientDataError(PropensityError):
    """Too little history, or too few converters, to learn or to judge."""


class PlanError(PropensityError):
    """The limits of a contact plan contradict each other."""


class SavedModelError(PropensityError):
    """A saved model is cut short, tampered with or of an unknown kind."""


class EngineError(PropensityError):
    """What computes ran out of memory or disk, or lost its executors."""


class StorageError(PropensityError):
    """The home folder cannot be written."""
