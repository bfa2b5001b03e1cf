"""A complete Envoy bootstrap for a configuration of ours: what `pointsman envoy` prints.

Every choice here was tried on Envoy 1.40; docs/envoy.md tells why each is what it is. In short: one endpoint per
worker with LEAST_REQUEST (one shared address would leave workers without streams), retries that go to another worker,
health checks that start at once, breakers that do not count an LLM's long answers as overload, the whole body
buffered with a limit of its own, and no header by which a client could choose a pod.

With access log accounting the stream to the router ends as soon as it has decided, and each finished request comes
back as one log entry. What the client is told about the choice (`target-pod`, `request-id` and so on in the response)
is then added by Envoy from dynamic metadata.
"""

from math import ceil
from typing import Any

from router.errors import SERVICE_UNAVAILABLE, error_type
from router.modes import ACCOUNTING_KEY, DESTINATION_KEY
from router.replies import (
    DESTINATION_HEADERS,
    ENDPOINT,
    ENVOY_LB,
    NAMESPACE,
    RESPONSE_HEADERS,
    RESPONSE_NAMESPACE,
    TARGET_POD,
    TARGET_POD_IP,
)
from workers.address import is_ip, parse_address
from workers.config import Config, ConfigError
from workers.discovery.endpoints_file import read_endpoints
from workers.discovery.file_source import fixed_names
from workers.envoy_pods import POD_CLUSTER, envoy_address, load_assignment

Json = dict[str, Any]

_TYPE = "type.googleapis.com/envoy"
OWN_ERRORS = ("UH", "UF", "UO", "UT", "UC", "URX", "LR", "UR", "UPE", "NC", "NR", "SI", "DT", "UMSDR")
"""Flags of the errors that Envoy answers by itself: no pod, no connection, a breaker, a time-out, a reset."""
_METHODS = {"name": ":method", "string_match": {"safe_regex": {"regex": "POST|OPTIONS"}}}
"""Those that pods are asked with: what has no body has nothing to be routed by, but for a browser's preflight."""
ROUTER_CLUSTER, ADMIN_CLUSTER = "pointsman", "pointsman_admin"


def bootstrap(config: Config) -> Json:
    """The bootstrap as a mapping, to be written as YAML or JSON. Raises ConfigError where the settings do not fit."""
    return {
        "node": {"id": "pointsman", "cluster": "pointsman"},
        "admin": {"address": envoy_address(config.envoy.admin)},
        "overload_manager": _overload_manager(config),
        "layered_runtime": {
            "layers": [
                {
                    "name": "static",
                    "static_layer": {"envoy.reloadable_features.ext_proc_graceful_grpc_close": True},
                }
            ]
        },
        "static_resources": {
            "listeners": [_listener(config)],
            "clusters": [_router_cluster(config), _pod_cluster(config), _admin_cluster(config)],
        },
    }


def _overload_manager(config: Config) -> Json:
    """Bounds what clients can make Envoy hold: connections and, where `envoy.heap_bytes` says how much there is,
    bodies, since near it new requests are refused. Those under way go on."""
    monitors = [
        {
            "name": "envoy.resource_monitors.global_downstream_max_connections",
            "typed_config": _typed(
                "extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                max_active_downstream_connections=config.envoy.max_connections,
            ),
        }
    ]
    manager: Json = {"refresh_interval": "0.25s", "resource_monitors": monitors}
    if config.envoy.heap_bytes is not None:
        heap = "envoy.resource_monitors.fixed_heap"
        kind = "extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig"
        size = config.envoy.heap_bytes
        monitors.append({"name": heap, "typed_config": _typed(kind, max_heap_size_bytes=size)})
        manager["actions"] = [
            {
                "name": f"envoy.overload_actions.{action}",
                "triggers": [{"name": heap, "threshold": {"value": share}}],
            }
            for action, share in (("shrink_heap", 0.8), ("stop_accepting_requests", 0.95))
        ]
    return manager


def _typed(kind: str, **values: Any) -> Json:
    return {"@type": f"{_TYPE}.{kind}", **values}


def _reachable(text: str, config: Config) -> Json:
    """The address as Envoy can dial it: a wildcard becomes `envoy.router_host`."""
    kind, place, port = parse_address(text)
    if kind == "tcp" and place in ("0.0.0.0", "::"):
        place = config.envoy.router_host
        return {"socket_address": {"address": place, "port_value": port}}
    return envoy_address(text)


def _listener(config: Config) -> Json:
    manager = _typed(
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="llm",
        codec_type="AUTO",
        stream_idle_timeout="3600s",
        request_timeout=f"{config.envoy.upload_seconds:.3f}s",
        normalize_path=True,
        early_header_mutation_extensions=[
            {
                "name": "remove-destinations",
                "typed_config": _typed(
                    "extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
                    mutations=[{"remove": name} for name in DESTINATION_HEADERS],
                ),
            }
        ],
        route_config={"name": "llm", "virtual_hosts": [{"name": "llm", "domains": ["*"], "routes": _routes(config)}]},
        http_filters=[
            {"name": "envoy.filters.http.ext_proc", "typed_config": _ext_proc(config)},
            {
                "name": "envoy.filters.http.router",
                "typed_config": _typed("extensions.filters.http.router.v3.Router"),
            },
        ],
    )
    if config.envoy.accounting == "access-log":
        manager["access_log"] = [_access_log()]
    manager["local_reply_config"] = {"mappers": _error_shapes(config)}
    return {
        "name": "llm",
        "address": envoy_address(config.envoy.listen),
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def _routes(config: Config) -> list[Json]:
    no_router = {
        "envoy.filters.http.ext_proc": _typed("extensions.filters.http.ext_proc.v3.ExtProcPerRoute", disabled=True)
    }
    pods: Json = {
        "match": {"prefix": "/v1/", "headers": [_METHODS]},
        "route": {"cluster": POD_CLUSTER, "timeout": "0s", "idle_timeout": "3600s"},
        "request_body_buffer_limit": config.envoy.body_limit_bytes,
    }
    if config.envoy.destination == "override-host":
        pods["route"]["retry_policy"] = {
            "retry_on": "connect-failure,refused-stream,reset-before-request",
            "num_retries": max(config.retry_candidates, 1),
        }
    told = _told_in_responses(config)
    if told:
        pods["response_headers_to_add"] = [_set_header(key, value) for key, value in told]
    return [
        {
            "match": {"path_separated_prefix": "/v1/models"},
            "route": {"cluster": ADMIN_CLUSTER},
            "typed_per_filter_config": no_router,
        },
        pods,
        {
            "match": {"prefix": "/"},
            "direct_response": {
                "status": 404,
                "body": {
                    "inline_string": '{"error":{"message":"unknown request path","type":"invalid_request_error",'
                    '"code":null,"param":null}}'
                },
            },
            "response_headers_to_add": [_set_header("content-type", "application/json")],
            "typed_per_filter_config": no_router,
        },
    ]


def _told_in_responses(config: Config) -> list[tuple[str, str]]:
    """Names and values of what Envoy itself adds to the pods' responses. Later ones win where they have a value.

    After a retry it is Envoy alone who knows which pod answered. With access log accounting that goes to the client as
    it is; otherwise the router reads it and tells the pod by its name.
    """
    told = []
    if config.envoy.accounting == "access-log":
        told += [
            (key, f"%DYNAMIC_METADATA({namespace}:{field})%")
            for key, namespace, field in (
                (TARGET_POD, NAMESPACE, "pod"),
                (TARGET_POD_IP, NAMESPACE, "target"),
                ("request-id", NAMESPACE, "request-id"),
                ("routing-strategy", NAMESPACE, "strategy"),
                *((name, RESPONSE_NAMESPACE, name) for name in RESPONSE_HEADERS),
            )
        ]
        if config.envoy.destination == "override-host":
            told.append((TARGET_POD, f"%UPSTREAM_METADATA({NAMESPACE}:pod)%"))
    if config.envoy.destination == "override-host":
        told.append((TARGET_POD_IP, "%UPSTREAM_REMOTE_ADDRESS%"))
    return told


def _set_header(name: str, value: str) -> Json:
    return {
        "header": {"key": name, "value": value},
        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
        "keep_empty_value": False,
    }


def _ext_proc(config: Config) -> Json:
    envoy = config.envoy
    by_log = envoy.accounting == "access-log"
    # Ten take a second, in which a killed worker that is the only one is back; three, 20 ms.
    retries = 3 if _may_pass_unrouted(config) else 10
    return _typed(
        "extensions.filters.http.ext_proc.v3.ExternalProcessor",
        grpc_service={
            "envoy_grpc": {"cluster_name": ROUTER_CLUSTER},
            "retry_policy": {
                "num_retries": retries,
                "retry_on": "unavailable,connect-failure,refused-stream,reset",
                "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.5s"},
                "retry_host_predicate": [
                    {
                        "name": "envoy.retry_host_predicates.previous_hosts",
                        "typed_config": _typed("extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"),
                    }
                ],
                # The worker that is gone has the fewest streams, so it is nearly always the first choice.
                "host_selection_retry_max_attempts": 100,
            },
            "initial_metadata": [
                {"key": ACCOUNTING_KEY, "value": envoy.accounting},
                {"key": DESTINATION_KEY, "value": envoy.destination},
            ],
        },
        processing_mode={
            "request_header_mode": "SEND",
            "request_body_mode": "BUFFERED",
            "response_header_mode": "SKIP" if by_log else "SEND",
            "response_body_mode": "NONE",
            # Trailers alone would pass unseen, and with this destination to a pod that nobody chose.
            "request_trailer_mode": "SEND" if envoy.destination == "override-host" else "SKIP",
            "response_trailer_mode": "SKIP",
        },
        failure_mode_allow=_may_pass_unrouted(config),
        allow_mode_override=True,
        # Else Envoy takes no content-length of a body that is exchanged where responses are watched by override alone.
        allow_content_length_header=True,
        route_cache_action="CLEAR",
        status_on_error={"code": "ServiceUnavailable"},
        message_timeout=f"{_message_timeout(config)}s",
        max_message_timeout="600s",
        mutation_rules={"allow_all_routing": False},
        metadata_options={"receiving_namespaces": {"untyped": [NAMESPACE, RESPONSE_NAMESPACE, ENVOY_LB]}},
    )


def _message_timeout(config: Config) -> int:
    """Seconds for an answer of the router, which may have to wait for two prefills."""
    return max(60, ceil(2 * config.pd.timeout_seconds) + 10)


def _may_pass_unrouted(config: Config) -> bool:
    """While the router is gone: where there is something to fall back to, and no lock that only the router opens."""
    limits = config.limits
    locked = limits.require_key or bool(limits.bearer_token.get_secret_value())
    return config.envoy.destination == "override-host" and not locked


def _access_log() -> Json:
    return {
        "name": "envoy.access_loggers.http_grpc",
        "filter": {
            "metadata_filter": {
                "matcher": {"filter": NAMESPACE, "path": [{"key": "ticket"}], "value": {"present_match": True}},
                "match_if_key_not_found": False,
            }
        },
        "typed_config": _typed(
            "extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
            common_config={
                "log_name": "pointsman",
                "transport_api_version": "V3",
                "grpc_service": {"envoy_grpc": {"cluster_name": ROUTER_CLUSTER}},
                "buffer_flush_interval": "0.02s",
                "buffer_size_bytes": 16384,
            },
        ),
    }


def _error_shapes(config: Config) -> list[Json]:
    """What Envoy answers by itself in the shape of all other errors, the first that fits. By stream the router sees
    responses, Envoy's own included, and does that, but for those that no router is asked about."""
    no_router = "response.code_details.startsWith('ext_proc_error')"
    unseen = [
        _unflagged(f"{no_router} && response.code == 504", 504, "the router does not answer in time"),
        _unflagged(no_router, 503, "no router answers"),
        _unflagged("response.code_details == 'overload'", 503, "overloaded"),
    ]
    if config.envoy.accounting == "stream":
        return unseen
    return [
        *unseen,
        _unflagged("response.code_details == 'request_payload_too_large'", 413, "request body is too large"),
        _unflagged(
            "response.code_details == 'request_overall_timeout' && response.code == 408", 408, "request came too slowly"
        ),
        _own_errors(503),
        _own_errors(None),
    ]


def _unflagged(details: str, status: int, message: str) -> Json:
    """The same for errors that Envoy answers without a flag: they are told by what it notes about them."""
    expression = _typed("extensions.access_loggers.filters.cel.v3.ExpressionFilter", expression=details)
    return {
        "filter": {
            "extension_filter": {"name": "envoy.access_loggers.extension_filters.cel", "typed_config": expression}
        },
        "body_format_override": {"json_format": {"error": _error(status, message)}},
    }


def _error(status: int, message: str) -> Json:
    code = SERVICE_UNAVAILABLE if status == 503 else None
    return {"message": message, "type": error_type(status), "code": code, "param": None}


def _own_errors(status: int | None) -> Json:
    """Errors of Envoy's own in the shape of all others, where the router sees no responses. They are told by their
    flags: the router's refusals have none."""
    flagged: Json = {"response_flag_filter": {"flags": list(OWN_ERRORS)}}
    only = flagged
    if status is not None:
        comparison = {"op": "EQ", "value": {"default_value": status, "runtime_key": "pointsman.own_errors"}}
        only = {"and_filter": {"filters": [flagged, {"status_code_filter": {"comparison": comparison}}]}}
    error = _error(status or 500, "%LOCAL_REPLY_BODY%")
    return {"filter": only, "body_format_override": {"json_format": {"error": error}}}


def _router_cluster(config: Config) -> Json:
    endpoints = [
        {"endpoint": {"address": _reachable(config.worker_address(number), config)}} for number in range(config.workers)
    ]
    cluster = {
        "name": ROUTER_CLUSTER,
        "type": _cluster_type(endpoints),
        "connect_timeout": "1s",
        "lb_policy": "LEAST_REQUEST",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": _typed(
                "extensions.upstreams.http.v3.HttpProtocolOptions",
                explicit_http_config={
                    "http2_protocol_options": {"connection_keepalive": {"interval": "10s", "timeout": "10s"}}
                },
            )
        },
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": 65536,
                    "max_requests": 65536,
                    "max_pending_requests": 65536,
                    "max_retries": 1024,
                }
            ]
        },
        "health_checks": [
            {
                "grpc_health_check": {},
                "interval": "1s",
                "timeout": "1s",
                "no_traffic_interval": "1s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
            }
        ],
        # With no worker healthy, try them all the same: one may have come up since the last health check.
        "common_lb_config": {"healthy_panic_threshold": {"value": 1}},
        "load_assignment": {"cluster_name": ROUTER_CLUSTER, "endpoints": [{"lb_endpoints": endpoints}]},
    }
    if config.tls is not None:
        cluster["transport_socket"] = _tls(config)
    return cluster


def _tls(config: Config) -> Json:
    envoy = config.envoy
    common: Json = {"alpn_protocols": ["h2"]}
    if envoy.router_ca is not None:
        checks: Json = {"trusted_ca": {"filename": str(envoy.router_ca)}}
        common["validation_context"] = checks
        if envoy.router_name is not None:
            kind = "IP_ADDRESS" if is_ip(envoy.router_name) else "DNS"
            checks["match_typed_subject_alt_names"] = [{"san_type": kind, "matcher": {"exact": envoy.router_name}}]
    if envoy.client_certificate is not None:
        common["tls_certificates"] = [
            {
                "certificate_chain": {"filename": str(envoy.client_certificate)},
                "private_key": {"filename": str(envoy.client_key)},
            }
        ]
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": _typed("extensions.transport_sockets.tls.v3.UpstreamTlsContext", common_tls_context=common),
    }


def _cluster_type(endpoints: list[Json]) -> str:
    """Names must be resolved; addresses and unix sockets need not."""
    hosts = [endpoint["endpoint"]["address"].get("socket_address", {}).get("address", "") for endpoint in endpoints]
    return "STRICT_DNS" if any(map(_named, hosts)) else "STATIC"


def _named(host: str) -> bool:
    return any(char.isalpha() for char in host) and ":" not in host


def _pod_cluster(config: Config) -> Json:
    breakers = {"thresholds": [{"max_connections": 65536, "max_requests": 65536, "max_pending_requests": 65536}]}
    base: Json = {"name": POD_CLUSTER, "connect_timeout": "5s", "circuit_breakers": breakers}
    if config.envoy.destination == "override-host":
        return {**base, **_override_host(config)}
    original_dst: Json = (
        {"metadata_key": {"key": NAMESPACE, "path": [{"key": "target"}]}}
        if config.envoy.destination == "metadata"
        else {"use_http_header": True, "http_header_name": TARGET_POD}
    )
    return {
        **base,
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "original_dst_lb_config": original_dst,
    }


def _override_host(config: Config) -> Json:
    round_robin = {
        "typed_extension_config": {
            "name": "envoy.load_balancing_policies.round_robin",
            "typed_config": _typed("extensions.load_balancing_policies.round_robin.v3.RoundRobin"),
        }
    }
    return {
        **_listed_pods(config),
        "load_balancing_policy": {
            "policies": [
                {
                    "typed_extension_config": {
                        "name": "envoy.load_balancing_policies.override_host",
                        "typed_config": _typed(
                            "extensions.load_balancing_policies.override_host.v3.OverrideHost",
                            override_host_sources=[{"metadata": {"key": ENVOY_LB, "path": [{"key": ENDPOINT}]}}],
                            fallback_policy={"policies": [round_robin]},
                        ),
                    }
                }
            ]
        },
    }


def _listed_pods(config: Config) -> Json:
    """Where Envoy has its list of pods from: the file that the router keeps, or here."""
    if config.envoy.pods_file is not None:
        source = {"path_config_source": {"path": str(config.envoy.pods_file)}, "resource_api_version": "V3"}
        return {"type": "EDS", "eds_cluster_config": {"eds_config": source}}
    if config.endpoints is None:
        raise ConfigError(
            "envoy.destination override-host: Envoy must know the pods itself; set envoy.pods_file, or endpoints"
        )
    names = fixed_names(read_endpoints(config.endpoints))
    return {"type": "STRICT_DNS", "load_assignment": load_assignment(names)}


def _admin_cluster(config: Config) -> Json:
    endpoints = [{"endpoint": {"address": _reachable(config.admin, config)}}]
    return {
        "name": ADMIN_CLUSTER,
        "type": _cluster_type(endpoints),
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": ADMIN_CLUSTER, "endpoints": [{"lb_endpoints": endpoints}]},
    }
