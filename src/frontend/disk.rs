//! A queue used as a plain disk: one request after another, each waited for, errors as errors. For tests
//! and set-up, where clarity counts and speed doesn't.

use std::time::Duration;

use super::Error;
use super::blk::{SECTOR_BYTES, SECTORS_PER_PAGE};
use super::queue::Queue;
use super::request::{ID_BYTES, Op, Range, Status};
use crate::page::{PAGE_SIZE, Page, ZERO_PAGE};

/// How long a single request may take before the device counts as stuck.
const PATIENCE: Duration = Duration::from_secs(30);

impl Queue {
    /// Sends one request and waits for its answer, whatever it is. Nothing else may be in flight.
    ///
    /// # Errors
    /// When something is in flight, or no answer comes.
    pub fn run(&mut self, op: Op) -> Result<Status, Error> {
        if self.in_flight() > 0 {
            return Err(Error::Usage("other requests are in flight"));
        }
        self.stage(0, op)?;
        self.publish()?;
        Ok(self.wait(PATIENCE)?.status)
    }

    /// Sends one request and waits until it is done.
    ///
    /// # Errors
    /// As [`Self::run`], and when the device answers anything but OK.
    pub fn run_ok(&mut self, op: Op) -> Result<(), Error> {
        match self.run(op)? {
            Status::Ok => Ok(()),
            status => Err(Error::Failed { op: op.name(), sector: op.sector(), status }),
        }
    }

    /// Stores bytes from a sector on, in one request; the length must be whole sectors.
    ///
    /// # Errors
    /// As [`Self::run_ok`], and when they don't fit one request's buffer.
    pub fn write_bytes(&mut self, sector: u64, bytes: &[u8]) -> Result<(), Error> {
        self.write_data(0, 0, bytes)?;
        self.run_ok(Op::Write { sector, bytes: length(bytes.len())? })
    }

    /// Loads bytes from a sector on, in one request; the length must be whole sectors.
    ///
    /// # Errors
    /// As [`Self::run_ok`], and when they don't fit one request's buffer.
    pub fn read_bytes(&mut self, sector: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.run_ok(Op::Read { sector, bytes: length(bytes.len())? })?;
        self.read_data(0, 0, bytes)
    }

    /// Stores pages from a slot on, in as few requests as the buffer allows.
    ///
    /// # Errors
    /// As [`Self::run_ok`].
    pub fn write_pages(&mut self, slot: u64, pages: &[Page]) -> Result<(), Error> {
        let at_once = self.pages_per_request()?;
        for (n, chunk) in pages.chunks(at_once).enumerate() {
            self.write_bytes((slot + (n * at_once) as u64) * SECTORS_PER_PAGE, chunk.as_flattened())?;
        }
        Ok(())
    }

    /// Loads `count` pages from a slot on.
    ///
    /// # Errors
    /// As [`Self::run_ok`].
    pub fn read_pages(&mut self, slot: u64, count: usize) -> Result<Vec<Page>, Error> {
        let at_once = self.pages_per_request()?;
        let mut pages = vec![ZERO_PAGE; count];
        for (n, chunk) in pages.chunks_mut(at_once).enumerate() {
            self.read_bytes((slot + (n * at_once) as u64) * SECTORS_PER_PAGE, chunk.as_flattened_mut())?;
        }
        Ok(pages)
    }

    /// Loads one page.
    ///
    /// # Errors
    /// As [`Self::run_ok`].
    pub fn read_page(&mut self, slot: u64) -> Result<Page, Error> {
        let mut page = ZERO_PAGE;
        self.read_bytes(slot * SECTORS_PER_PAGE, &mut page)?;
        Ok(page)
    }

    /// Discards `count` pages from a slot on.
    ///
    /// # Errors
    /// As [`Self::run_ok`].
    pub fn discard(&mut self, slot: u64, count: u32) -> Result<(), Error> {
        self.write_ranges(0, &[page_range(slot, count, 0)?])?;
        self.run_ok(Op::Discard { ranges: 1 })
    }

    /// Makes `count` pages from a slot on read as zeros.
    ///
    /// # Errors
    /// As [`Self::run_ok`].
    pub fn write_zeroes(&mut self, slot: u64, count: u32, unmap: bool) -> Result<(), Error> {
        self.write_ranges(0, &[page_range(slot, count, u32::from(unmap))?])?;
        self.run_ok(Op::WriteZeroes { ranges: 1 })
    }

    /// Flushes.
    ///
    /// # Errors
    /// As [`Self::run_ok`].
    pub fn flush(&mut self) -> Result<(), Error> {
        self.run_ok(Op::Flush)
    }

    /// The device's name, up to its first zero byte.
    ///
    /// # Errors
    /// As [`Self::run_ok`].
    pub fn id(&mut self) -> Result<String, Error> {
        let mut id = [0; ID_BYTES as usize];
        self.write_data(0, 0, &id)?;
        self.run_ok(Op::GetId)?;
        self.read_data(0, 0, &mut id)?;
        let end = id.iter().position(|byte| *byte == 0).unwrap_or(id.len());
        Ok(String::from_utf8_lossy(&id[..end]).into_owned())
    }

    fn pages_per_request(&self) -> Result<usize, Error> {
        match self.data_bytes() / PAGE_SIZE {
            0 => Err(Error::Usage("a request's buffer is smaller than a page")),
            pages => Ok(pages),
        }
    }
}

fn page_range(slot: u64, count: u32, flags: u32) -> Result<Range, Error> {
    let sectors = u64::from(count) * SECTORS_PER_PAGE;
    let sectors =
        u32::try_from(sectors).map_err(|_| Error::Usage("one range has 4294967295 sectors at most"))?;
    Ok(Range { sector: slot * SECTORS_PER_PAGE, sectors, flags })
}

fn length(bytes: usize) -> Result<u32, Error> {
    if !(bytes as u64).is_multiple_of(SECTOR_BYTES) {
        return Err(Error::Usage("a request moves whole sectors of 512 bytes"));
    }
    u32::try_from(bytes).map_err(|_| Error::Usage("a request is shorter than 4 GiB"))
}
