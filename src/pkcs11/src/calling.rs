//! Reports the name of each PKCS#11 function to the parent process before the call. If the module crashes or hangs, the
//! parent can name the function.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

/// Callback that receives the name of a PKCS#11 function before the call.
type Report = Box<dyn FnMut(&'static str) + Send>;

static IS_REPORTED: AtomicBool = AtomicBool::new(false);
static REPORT: Mutex<Option<Report>> = Mutex::new(None);

/// Passes the function name of every further PKCS#11 call to `report`. Consecutive calls of the same function are
/// reported once.
pub(crate) fn report_to(mut report: impl FnMut(&'static str) + Send + 'static) {
    let mut last = "";
    *REPORT.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(move |function| {
        if function != last {
            last = function;
            report(function);
        }
    }));
    IS_REPORTED.store(true, Ordering::Relaxed);
}

/// Ends the reports.
pub(crate) fn report_no_more() {
    IS_REPORTED.store(false, Ordering::Relaxed);
    *REPORT.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

/// Reports that `function` is called next.
pub(crate) fn next(function: &'static str) {
    if !IS_REPORTED.load(Ordering::Relaxed) {
        return;
    }
    if let Some(report) = &mut *REPORT.lock().unwrap_or_else(PoisonError::into_inner) {
        report(function);
    }
}
