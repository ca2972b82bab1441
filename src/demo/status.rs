//! The few numbers that the demo shows, out of what `ballast status --json` prints: the demo is a client like any
//! other and depends on that output alone. Pure.

use serde_json::Value;

use super::error::Error;
use crate::page::PAGE_SIZE_U64;

/// The pool and its VMs at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// The most bytes that the pool may take.
    pub max_bytes: u64,
    /// What it takes.
    pub used_bytes: u64,
    /// Each VM, in the daemon's order.
    pub vms: Vec<VmStatus>,
}

/// One VM at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmStatus {
    /// Its name.
    pub name: String,
    /// Pages that the daemon holds for it, the same-filled ones included.
    pub stored_pages: u64,
    /// Those that cost no pool memory.
    pub same_filled_pages: u64,
    /// Pool memory that its pages take.
    pub pool_bytes: u64,
    /// Pages written, read and dropped since the daemon started.
    pub stores: u64,
    /// Pages read.
    pub loads: u64,
    /// Pages dropped.
    pub invalidates: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

impl Status {
    /// Reads the output of `ballast status --json`.
    ///
    /// # Errors
    /// When it is not JSON or lacks a field.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let value: Value = serde_json::from_str(text).map_err(Error::StatusSyntax)?;
        let vms = value
            .pointer("/vms")
            .and_then(Value::as_array)
            .ok_or_else(|| Error::StatusField { pointer: "/vms".to_owned() })?;
        Ok(Self {
            max_bytes: number(&value, "/pool/max_bytes")?,
            used_bytes: number(&value, "/pool/used_bytes")?,
            vms: vms.iter().map(VmStatus::parse).collect::<Result<_, _>>()?,
        })
    }

    /// The VM of that name.
    #[must_use]
    pub fn vm(&self, name: &str) -> Option<&VmStatus> {
        self.vms.iter().find(|vm| vm.name == name)
    }

    /// All VMs as one.
    #[must_use]
    pub fn sum(&self) -> VmStatus {
        let mut sum = VmStatus { name: "both".to_owned(), ..VmStatus::default() };
        for vm in &self.vms {
            sum.stored_pages += vm.stored_pages;
            sum.same_filled_pages += vm.same_filled_pages;
            sum.pool_bytes += vm.pool_bytes;
            sum.stores += vm.stores;
            sum.loads += vm.loads;
            sum.invalidates += vm.invalidates;
            sum.errors += vm.errors;
        }
        sum
    }
}

impl VmStatus {
    fn parse(value: &Value) -> Result<Self, Error> {
        let name = value.pointer("/name").and_then(Value::as_str);
        Ok(Self {
            name: name.ok_or_else(|| Error::StatusField { pointer: "/vms/name".to_owned() })?.to_owned(),
            stored_pages: number(value, "/stored_pages")?,
            same_filled_pages: number(value, "/same_filled_pages")?,
            pool_bytes: number(value, "/pool_bytes")?,
            stores: number(value, "/stores")?,
            loads: number(value, "/loads")?,
            invalidates: number(value, "/invalidates")?,
            errors: number(value, "/errors")?,
        })
    }

    /// What its pages would take in the host's memory as they are.
    #[must_use]
    pub fn uncompressed_bytes(&self) -> u64 {
        self.stored_pages * PAGE_SIZE_U64
    }

    /// What keeping them compressed saves.
    #[must_use]
    pub fn saved_bytes(&self) -> u64 {
        self.uncompressed_bytes().saturating_sub(self.pool_bytes)
    }
}

fn number(value: &Value, pointer: &str) -> Result<u64, Error> {
    value
        .pointer(pointer)
        .and_then(Value::as_u64)
        .ok_or_else(|| Error::StatusField { pointer: pointer.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{
        "pool": {"max_bytes": 1000, "used_bytes": 500, "payload_bytes": 400, "stored_pages": 3,
                 "same_filled_pages": 1},
        "vms": [
            {"name": "web1", "size_bytes": 9, "limit_bytes": 9, "stored_pages": 2, "same_filled_pages": 1,
             "pool_bytes": 300, "stores": 7, "loads": 5, "invalidates": 4, "errors": 0, "connected": true},
            {"name": "web2", "size_bytes": 9, "limit_bytes": 9, "stored_pages": 1, "same_filled_pages": 0,
             "pool_bytes": 200, "stores": 1, "loads": 0, "invalidates": 0, "errors": 2, "connected": false}
        ]}"#;

    #[test]
    fn a_status_is_read_and_summed() {
        let status = Status::parse(TEXT).expect("a status");
        assert_eq!((status.max_bytes, status.used_bytes), (1000, 500));
        let web1 = status.vm("web1").expect("web1 is there");
        assert_eq!((web1.uncompressed_bytes(), web1.saved_bytes()), (8192, 7892));
        let sum = status.sum();
        assert_eq!((sum.stored_pages, sum.pool_bytes, sum.stores, sum.errors), (3, 500, 8, 2));
        assert_eq!(status.vm("web3"), None);
    }

    #[test]
    fn a_status_that_lacks_a_number_names_it() {
        let error = Status::parse(r#"{"vms": [], "pool": {"max_bytes": 1}}"#).expect_err("incomplete");
        assert_eq!(error.to_string(), "the status has no number at /pool/used_bytes");
        assert!(matches!(Status::parse("no"), Err(Error::StatusSyntax(_))));
    }
}
