"""Who may take a seat besides having room: LoRA adapters, and output that is asked for but not yet made."""

from __future__ import annotations

from planc.runtime.limits import Limits

#: decode steps that SGLang looks ahead when it sets the reserved share anew after a preemption
_RETRACT_STEPS = 20


class Adapters:
    """LoRA adapters on the device: at most `most`; unused ones stay until another needs the place."""

    def __init__(self, most: int | None) -> None:
        self.most = most
        self._users: dict[int, int] = {}  # of each loaded adapter, the least recently taken first

    def full_for(self, name: int | None) -> bool:
        """Whether a sequence of this adapter must wait for another adapter's sequences to end."""
        if self.most is None or name is None or self._users.get(name):
            return False
        return sum(users > 0 for users in self._users.values()) >= self.most

    def use(self, name: int) -> bool:
        """One more sequence runs with an adapter; whether it must be loaded first."""
        loaded = name in self._users
        if not loaded and self.most is not None and len(self._users) >= self.most:
            del self._users[next(other for other, users in self._users.items() if not users)]
        self._users[name] = self._users.pop(name, 0) + 1
        return not loaded

    def leave(self, name: int) -> None:
        self._users[name] -= 1


class Reserve:
    """The share of outstanding output that must be free at admission, as it falls and is set anew.

    SGLang's rule (its new-token ratio): from `reserved_output` down to `reserved_floor` over
    `reserved_steps` decode steps; after a preemption, what the running sequences have made of what they
    asked for, looking some steps ahead; when idle, from the start.
    """

    def __init__(self, limits: Limits) -> None:
        self.first = limits.reserved_output
        self.floor = self.first if limits.reserved_floor is None else limits.reserved_floor
        self._fall = (self.first - self.floor) / limits.reserved_steps
        self.partial = 0 < self.first < 1
        self._since, self._then = 0, self.first

    def share(self, step: int) -> float:
        return max(self._then - self._fall * (step - self._since), self.floor)

    def reset(self, step: int) -> None:
        self._since, self._then = step, self.first

    def learn(self, asked: int, owed: int, running: int, step: int) -> None:
        """After a preemption: `running` sequences asked for so many tokens, and still may make `owed`."""
        if asked:
            self._since, self._then = step, min((asked - owed + _RETRACT_STEPS * running) / asked, 1.0)
        else:
            self.reset(step)

    def restless(self, step: int, block_size: int) -> bool:
        """Whether a sequence that does not fit may fit after a step in which nothing ends: the share falls,
        or the output asked for shrinks while blocks are not yet full."""
        return self.partial and (block_size > 1 or self.share(step) > self.floor)
