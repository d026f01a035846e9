"""Pools of a gateway on a store of their own."""

from ringstone import models
from tests.framework.gateway import GatewayProcess


def make_store_pool(gateway: GatewayProcess, name: str, size: int, **options: float) -> models.Pool:
    """On a file of `size` bytes in the gateway's own directory. `options`: of models.StoreOptions."""
    with gateway.client() as client:
        return client.create_pool(
            models.PoolCreate(
                name=name,
                type="store",
                path=str(gateway.root / f"{name}.drive"),
                store=models.StoreOptions.model_validate({"size": size, **options}),
            )
        )
