"""The process `ringstone manager`: the API and failover over one store, until SIGTERM or SIGINT."""

import asyncio
import logging
import time
from contextlib import ExitStack

from ringstone.api.serving import TcpServer
from ringstone.gateway.events import EventLog
from ringstone.gateway.logs import set_up_logging
from ringstone.gateway.notify import sd_notify
from ringstone.manager.app import ManagerContext, build_app
from ringstone.manager.config import ManagerConfig
from ringstone.manager.failover import Failover
from ringstone.manager.hosts import Hosts, connector
from ringstone.manager.operations import Operations
from ringstone.state.etcd import EtcdStore
from ringstone.stopping import hold_stop_signals, stopped_by_signals
from ringstone.version import version

log = logging.getLogger("ringstone.manager")


def run_manager(config: ManagerConfig) -> None:
    """Errors of ringstone.errors before the API is up."""
    set_up_logging(config.log_level)
    # One line for each call to a gateway is for debugging only.
    logging.getLogger("httpx2").setLevel(logging.WARNING if config.log_level != "debug" else logging.DEBUG)
    logging.getLogger("httpcore2").setLevel(logging.WARNING)
    config.listening.check()
    config.gateway_tokens.check()
    connect = connector(config.gateway_ca)
    hold_stop_signals()
    with ExitStack() as stack:
        listener = stack.enter_context(config.listening.bind())
        store = EtcdStore(config.etcd)
        stack.callback(store.close)
        hosts = Hosts(store, config.gateway_tokens, connect)
        stack.callback(hosts.close)
        operations = Operations(store, hosts, EventLog("ringstone.manager"))
        if config.failover_grace_s is not None:
            failover = Failover(operations, config.failover_grace_s)
            stack.callback(failover.stop)
            failover.start()
        context = ManagerContext(
            operations, config.listening.url, config.etcd.where, time.time_ns(), config.failover_grace_s
        )
        server = TcpServer(
            build_app(context),
            config.listening,
            listener,
            access_log=config.log_level == "debug",
            report=log.error,
        )

        async def serve() -> None:
            with stopped_by_signals(asyncio.get_running_loop(), server.stop):
                log.info(
                    "Ringstone %s manages the cluster in etcd at %s, at %s.",
                    version(),
                    config.etcd.where,
                    config.listening.url,
                )
                sd_notify("READY=1")
                await server.run_on_listener()
            sd_notify("STOPPING=1")

        asyncio.run(serve())
    log.info("The manager has stopped.")
