"""The error catalogue: one class per mistake a user can make, each with one message template.

Every message names the field or file, the value found, and the mend. The command line prints
`str(error)` and exits with `error.exit_code`; nothing here ever reaches a user as a traceback.
This module imports nothing, so every room may raise from it.
"""

from __future__ import annotations

from typing import ClassVar


class PlancError(Exception):
    """Base of everything planc raises on purpose. `template` is filled from keyword arguments."""

    exit_code: ClassVar[int] = 2
    template: ClassVar[str] = "{message}"

    def __init__(self, **fields: object) -> None:
        self.fields = fields
        super().__init__(self.template.format(**fields))


# -- requests and files ------------------------------------------------------------------


class FileMissing(PlancError):
    template = "{what}: there is no file or folder at '{path}'. {mend}"


class FileUnreadable(PlancError):
    template = "{what}: '{path}' could not be read as {format}: {reason}. {mend}"


class InvalidField(PlancError):
    template = "{where}: {field} = {value!r}: {reason}. {mend}"


class UnknownField(PlancError):
    template = "{where}: there is no field '{field}'. {mend}"


class UnknownName(PlancError):
    """A name that a catalogue (GPUs, engines, formats, metrics) does not hold."""

    template = "{field} = {value!r} is not a known {kind}. {mend}"


# -- models ----------------------------------------------------------------------------


class UnsupportedModel(PlancError):
    template = "model '{model}': {reason}. {mend}"


class TraceFailed(PlancError):
    template = "model '{model}' could not be traced: {reason}. {mend}"


class UntrustedCode(PlancError):
    template = "model '{model}' carries its own code ({what}), which planc does not run unasked. {mend}"


class WeightsMismatch(PlancError):
    template = "weights in '{path}' do not fit the traced model: {reason}. {mend}"


# -- the IR ----------------------------------------------------------------------------


class InvalidGraph(PlancError):
    """A verifier rule broke. `where` is the user's own source line."""

    exit_code = 1
    template = "after pass '{after}': rule '{rule}' broke at node '{node}': {reason}\n  from {where}"


# -- plans and bundles -----------------------------------------------------------------


class InvalidBundle(PlancError):
    template = "bundle '{path}': {reason}. {mend}"


class NewerSchema(PlancError):
    template = (
        "bundle '{path}' has schema_version {found}; this planc ({version}) reads up to {supported}. "
        "Upgrade planc, or compile the request again with this version."
    )


# -- outcomes that are not mistakes in the input -----------------------------------------


class CheckFailed(PlancError):
    exit_code = 1
    template = "{what}: {reason}. {mend}"


class Infeasible(PlancError):
    """No plan meets the request. `relaxations` are the smallest single changes that would."""

    exit_code = 3
    template = "no plan meets this request: {reason}.{relaxations}"


class MissingDependency(PlancError):
    """An optional package is asked for and absent."""

    exit_code = 4
    template = "{package} is not installed. Install it with: pip install 'planc[{extra}]'."


class ToolFailed(PlancError):
    exit_code = 4
    template = "{tool} failed: {reason}. {mend}"
