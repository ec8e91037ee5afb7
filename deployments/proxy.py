"""Serve's HTTP proxy: one per cluster, so its first user decides where it listens."""

import socket

from ray import serve

from deployments.plane import Dashboard, serve_details
from nft_ray.config import HttpConfig


def start_serve(http: HttpConfig | None, dashboard_url: str | None) -> None:
    """Start Serve, or check that the one that runs listens where it should. Its HTTP options cannot change."""
    if http is None:
        serve.start(proxy_location="Disabled")
        return
    if dashboard_url is None:
        raise ValueError("scorers.http: this cluster has no Ray dashboard, which tells where Serve listens")
    running = serve_details(Dashboard(dashboard_url))
    if running.get("controller_info", {}).get("actor_id"):
        options, location = running.get("http_options") or {}, running.get("proxy_location")
        if location in (None, "Disabled") or (options.get("host"), options.get("port")) != (http.host, http.port):
            where = "without HTTP" if location in (None, "Disabled") else f"on {options['host']}:{options['port']}"
            raise ValueError(
                f"scorers.http = {http.host}:{http.port}: Serve runs on this cluster already {where}, and one cluster "
                "has one HTTP proxy; use that, or restart the cluster"
            )
        return
    check_port(http)
    serve.start(proxy_location="HeadOnly", http_options={"host": http.host, "port": http.port})


def check_port(http: HttpConfig) -> None:
    """ValueError where the port is in use on this machine."""
    with socket.socket(socket.AF_INET6 if ":" in http.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http.host, http.port))
        except OSError as error:
            raise ValueError(
                f"scorers.http.port = {http.port}: cannot listen on {http.host}:{http.port} ({error.strerror}); "
                "choose another port"
            ) from None
