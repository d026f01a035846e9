//! The loaded libraries.

use std::ffi::CStr;
use std::sync::OnceLock;

use crate::bindings::Library;
use crate::error::RbdError;

/// The interface that the bindings were made for; librbd has kept it since 2012.
const LIBRBD: &str = "librbd.so.1";

/// Load librbd, which brings librados along, or answer what is loaded.
///
/// # Errors
/// It is not installed, or too old to have all functions.
pub fn library() -> Result<&'static Library, RbdError> {
    static LOADED: OnceLock<Result<Library, String>> = OnceLock::new();
    // SAFETY: the libraries' initialisers do nothing but set up their own state, and the bindings were made from the headers
    // of this interface version. It stays loaded for good.
    let loaded = LOADED.get_or_init(|| unsafe { Library::new(LIBRBD) }.map_err(|error| error.to_string()));
    loaded.as_ref().map_err(|why| RbdError::NoLibrary(why.clone()))
}

/// A C string that a library returned, as text.
///
/// # Safety
/// `text` is null or a NUL-terminated string that lives as long as the call.
pub unsafe fn text(text: *const std::ffi::c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
