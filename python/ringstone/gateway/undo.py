"""Steps that take back what was done when a later step fails, so that nothing is left half made."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from ringstone.gateway.events import EventLog

UndoLater = Callable[[str, Callable[[], object]], None]


@contextmanager
def undoing(events: EventLog, *, volume: str = "") -> Iterator[UndoLater]:
    """Yields `later(what, step)`. If the block raises, the steps run in reverse order and the error goes on;
    a step that fails itself is reported as an event and does not hide the error."""
    with ExitStack() as stack:

        def later(what: str, step: Callable[[], object]) -> None:
            def run() -> None:
                try:
                    step()
                except Exception as error:
                    events.say("error", f"Undoing ({what}) failed: {error}", volume=volume)

            stack.callback(run)

        yield later
        stack.pop_all()
