"""/v1/reactors, named by their CPU"""

from fastapi import APIRouter, status

from ringstone import models
from ringstone.api.context import ServiceDep

router = APIRouter(prefix="/reactors", tags=["reactors"])


@router.get("")
def list_reactors(service: ServiceDep) -> list[models.Reactor]:
    return [models.Reactor(index=index, core=core) for index, core in sorted(service.reactors().items())]


@router.post("", status_code=status.HTTP_201_CREATED)
def add_reactor(body: models.ReactorCreate, service: ServiceDep) -> models.Reactor:
    """A polling thread more, until the gateway ends. Queues move there as load makes it worth it."""
    service.add_reactor(body.core)
    index = next(index for index, core in service.reactors().items() if core == body.core)
    return models.Reactor(index=index, core=body.core)


@router.delete("/{core}", status_code=status.HTTP_204_NO_CONTENT)
def remove_reactor(core: int, service: ServiceDep) -> None:
    """Returns when its queues run elsewhere and its thread has ended."""
    service.remove_reactor(core)
