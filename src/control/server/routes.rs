//! What the server answers to: each path with its method, and beside it what the description says of it. Both are one list,
//! so that neither has what the other lacks.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::Serialize;
use serde::de::DeserializeOwned;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::{DESCRIBED, failure, metrics as exposition};
use crate::config::to_unknown_key;
use crate::control::api::{
    CheckOrder, CheckStatus, ClearError, Clearing, ErrorBody, Host, NewVm, PoolChange, PoolStatus,
    ReloadReport, Reloading, Removal, Report, Reporting, SetError, Status, VmChange, VmDetails, VmList,
    VmRemoved, VmStatus,
};

/// The daemon.
type Asked = State<Arc<dyn Host>>;
/// A body, of whatever content type it claims to be: `curl -d` says that JSON is a form.
type Body = Result<Bytes, BytesRejection>;

#[derive(OpenApi)]
#[openapi(info(
    title = "Ballast",
    description = "The control socket of a Ballast daemon: HTTP/1.1 on a Unix socket, for root, the daemon's user and the \
                   group of the socket. Sizes are bytes. Names are only ever added to; what is not known in an answer is to \
                   be passed over."
))]
struct Described;

/// All paths, and their description.
pub(super) fn described() -> OpenApiRouter<Arc<dyn Host>> {
    OpenApiRouter::with_openapi(Described::openapi())
        .routes(routes!(status))
        .routes(routes!(set_pool))
        .routes(routes!(check, begin_check))
        .routes(routes!(report))
        .routes(routes!(vms))
        .routes(routes!(vm, add_vm, set_vm, remove_vm))
        .routes(routes!(clear_vm))
        .routes(routes!(release_vm))
        .routes(routes!(reload))
        .routes(routes!(openapi))
        .routes(routes!(metrics))
}

/// The description's text.
#[derive(Clone)]
pub(super) struct Description(Arc<str>);

impl Description {
    pub(super) fn of(description: &utoipa::openapi::OpenApi) -> Self {
        // It is made of names and numbers; a test reads it.
        Self(description.to_json().unwrap_or_default().into())
    }
}

/// This description.
#[utoipa::path(get, path = "/api/v1/openapi.json", responses((status = 200, body = Object)))]
async fn openapi(Extension(Description(text)): Extension<Description>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], text.to_string()).into_response()
}

/// The daemon as it is now.
#[utoipa::path(get, path = "/api/v1/status",
    responses((status = 200, body = Status), (status = "default", body = ErrorBody)))]
async fn status(State(host): Asked) -> Response {
    answer(move || Ok(host.status())).await
}

/// All numbers of the status for Prometheus: OpenMetrics for whoever accepts it, or the older text.
#[utoipa::path(get, path = "/metrics", responses(
    (status = 200, body = String, content_type = "application/openmetrics-text"),
    (status = "default", body = ErrorBody)))]
async fn metrics(State(host): Asked, headers: HeaderMap) -> Response {
    let wanted = exposition::wanted(&headers);
    match tokio::task::spawn_blocking(move || host.metrics(wanted)).await {
        Ok(text) => exposition::answer(wanted, text),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

/// Changes what new pages are compressed with.
#[utoipa::path(post, path = "/api/v1/pool", request_body = PoolChange,
    responses((status = 200, body = PoolStatus), (status = "default", body = ErrorBody)))]
async fn set_pool(State(host): Asked, body: Body) -> Response {
    set(body, move |change: PoolChange| host.set_pool(change.checked()?)).await
}

/// Begins to look at stored pages, in place of a check that may be under way.
#[utoipa::path(post, path = "/api/v1/check", request_body = CheckOrder,
    responses((status = 200, body = CheckStatus), (status = "default", body = ErrorBody)))]
async fn begin_check(State(host): Asked, body: Body) -> Response {
    set(body, move |order| host.begin_check(order)).await
}

/// How far the check is that was begun last.
#[utoipa::path(get, path = "/api/v1/check",
    responses((status = 200, body = CheckStatus), (status = "default", body = ErrorBody)))]
async fn check(State(host): Asked) -> Response {
    match tokio::task::spawn_blocking(move || host.check()).await {
        Ok(Some(status)) => Json(status).into_response(),
        Ok(None) => failure(
            StatusCode::NOT_FOUND,
            "no check was begun since the daemon started: begin one with POST /api/v1/check",
        ),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

/// What stored pages are like, and what limits their VMs need. One at a time, and it takes seconds: another one meanwhile
/// is a conflict.
#[utoipa::path(get, path = "/api/v1/report", params(Reporting),
    responses((status = 200, body = Report), (status = "default", body = ErrorBody)))]
async fn report(State(host): Asked, query: Result<Query<Reporting>, QueryRejection>) -> Response {
    with(query, move |reporting| host.report(reporting)).await
}

/// All VMs.
#[utoipa::path(get, path = "/api/v1/vms",
    responses((status = 200, body = VmList), (status = "default", body = ErrorBody)))]
async fn vms(State(host): Asked) -> Response {
    answer(move || Ok(VmList { vms: host.status().vms })).await
}

/// All that is known of one VM.
#[utoipa::path(get, path = "/api/v1/vms/{name}", params(("name" = String, Path, description = "The VM.")),
    responses((status = 200, body = VmDetails), (status = "default", body = ErrorBody)))]
async fn vm(State(host): Asked, Path(name): Path<String>) -> Response {
    answer(move || host.vm(&name)).await
}

/// Adds a VM. One of that name is a conflict, whatever it is like: change it with POST.
#[utoipa::path(put, path = "/api/v1/vms/{name}", params(("name" = String, Path, description = "The VM.")),
    request_body = NewVm, responses((status = 201, body = VmDetails), (status = "default", body = ErrorBody)))]
async fn add_vm(State(host): Asked, Path(name): Path<String>, body: Body) -> Response {
    let mut response = set(body, move |vm| host.add_vm(&name, vm)).await;
    if response.status().is_success() {
        *response.status_mut() = StatusCode::CREATED;
    }
    response
}

/// Changes a VM.
#[utoipa::path(post, path = "/api/v1/vms/{name}", params(("name" = String, Path, description = "The VM.")),
    request_body = VmChange, responses((status = 200, body = VmStatus), (status = "default", body = ErrorBody)))]
async fn set_vm(State(host): Asked, Path(name): Path<String>, body: Body) -> Response {
    set(body, move |change| host.set_vm(&name, change)).await
}

/// Removes a VM, with its socket and its pages.
#[utoipa::path(delete, path = "/api/v1/vms/{name}",
    params(("name" = String, Path, description = "The VM."), Removal),
    responses((status = 200, body = VmRemoved), (status = "default", body = ErrorBody)))]
async fn remove_vm(
    State(host): Asked,
    Path(name): Path<String>,
    query: Result<Query<Removal>, QueryRejection>,
) -> Response {
    with(query, move |removal| host.remove_vm(&name, removal)).await
}

/// Drops all pages of a VM and gives it a fresh swap header.
#[utoipa::path(post, path = "/api/v1/vms/{name}/clear",
    params(("name" = String, Path, description = "The VM."), Clearing),
    responses((status = 200, body = Object), (status = "default", body = ErrorBody)))]
async fn clear_vm(
    State(host): Asked,
    Path(name): Path<String>,
    query: Result<Query<Clearing>, QueryRejection>,
) -> Response {
    with(query, move |clearing| {
        host.clear_vm(&name, clearing).map(|()| serde_json::json!({})).map_err(|error| {
            let message = error.to_string();
            match error {
                ClearError::Unknown { name, known } => SetError::Unknown { name, known },
                ClearError::Connected { .. } => SetError::Conflict { message },
                ClearError::Failed { .. } => SetError::Failed { message },
            }
        })
    })
    .await
}

/// Ends a VM's quarantine.
#[utoipa::path(post, path = "/api/v1/vms/{name}/release", params(("name" = String, Path, description = "The VM.")),
    responses((status = 200, body = VmStatus), (status = "default", body = ErrorBody)))]
async fn release_vm(State(host): Asked, Path(name): Path<String>) -> Response {
    answer(move || host.release_vm(&name)).await
}

/// Reads the configuration again and goes by it as far as a running daemon can.
#[utoipa::path(post, path = "/api/v1/reload", params(Reloading),
    responses((status = 200, body = ReloadReport), (status = "default", body = ErrorBody)))]
async fn reload(State(host): Asked, query: Result<Query<Reloading>, QueryRejection>) -> Response {
    with(query, move |reloading| host.reload(reloading)).await
}

/// Does what the body describes, and answers with what it led to.
async fn set<C: DeserializeOwned + Send + 'static, S: Serialize + Send + 'static>(
    body: Body,
    apply: impl FnOnce(C) -> Result<S, SetError> + Send + 'static,
) -> Response {
    let wanted = match body.map(|body| serde_json::from_slice(&body)) {
        Ok(Ok(wanted)) => wanted,
        Ok(Err(error)) => {
            return malformed(StatusCode::BAD_REQUEST, "the body is no such change", error.to_string());
        }
        Err(rejection) => {
            return malformed(rejection.status(), "the body can't be read", rejection.body_text());
        }
    };
    answer(move || apply(wanted)).await
}

/// The same with what stands behind the path.
async fn with<C: Send + 'static, S: Serialize + Send + 'static>(
    query: Result<Query<C>, QueryRejection>,
    apply: impl FnOnce(C) -> Result<S, SetError> + Send + 'static,
) -> Response {
    match query {
        Ok(Query(wanted)) => answer(move || apply(wanted)).await,
        Err(rejection) => {
            let what = "what stands behind the path can't be used";
            malformed(rejection.status(), what, rejection.body_text())
        }
    }
}

/// The refusal of what can't be read, with the key that was probably meant, and where to look.
fn malformed(status: StatusCode, what: &str, error: String) -> Response {
    let meant = to_unknown_key(&error).map(|key| format!("; did you mean `{key}`?"));
    failure(status, &format!("{what}: {error}{}; {DESCRIBED}", meant.unwrap_or_default()))
}

/// Answers with what `ask` gives. The host takes locks and writes files, which has no place on an event loop.
async fn answer<S: Serialize + Send + 'static>(
    ask: impl FnOnce() -> Result<S, SetError> + Send + 'static,
) -> Response {
    let error = match tokio::task::spawn_blocking(ask).await {
        Ok(Ok(status)) => return Json(status).into_response(),
        Ok(Err(error)) => error,
        Err(error) => SetError::Failed { message: error.to_string() },
    };
    let message = error.to_string();
    match error {
        SetError::Unknown { known, .. } => {
            (StatusCode::NOT_FOUND, Json(ErrorBody { error: message, known: Some(known) })).into_response()
        }
        SetError::Invalid { .. } => failure(StatusCode::BAD_REQUEST, &message),
        SetError::Conflict { .. } => failure(StatusCode::CONFLICT, &message),
        SetError::Failed { .. } => failure(StatusCode::INTERNAL_SERVER_ERROR, &message),
    }
}
