//! Reads what C gives by pointer: growable structs, strings, handles.

use std::ffi::{c_char, CStr};
use std::mem::size_of;

use crate::error::{invalid, unsupported, Result};

/// Structs of a later version may be longer; this much longer they are not.
const LONGEST: usize = 4096;

/// A struct whose first member is its size. What a later version added must be zero.
///
/// # Safety
/// `from` is NULL or points to `struct_size` readable bytes; `T` is plain data that begins with a
/// `usize`, and any bytes make a `T`.
pub unsafe fn structure<T: Copy>(from: *const T, name: &str) -> Result<T> {
    if from.is_null() {
        return Err(invalid!("{name}: NULL; expected a struct"));
    }
    // SAFETY: by the promise of this function.
    let said = unsafe { from.cast::<usize>().read_unaligned() };
    let known = size_of::<T>();
    if said < known || said > LONGEST {
        return Err(invalid!(
            "{name}->struct_size: {said}; expected its sizeof, {known}"
        ));
    }
    for at in known..said {
        // SAFETY: inside the struct, by its own account.
        if unsafe { *from.cast::<u8>().add(at) } != 0 {
            return Err(unsupported!(
                "{name}: byte {at} is set, in a field that this version does not know; expected 0"
            ));
        }
    }
    // SAFETY: at least `known` bytes are readable; any alignment.
    Ok(unsafe { from.read_unaligned() })
}

/// A string, as well as it is UTF-8.
///
/// # Safety
/// `from` is NULL or NUL-terminated.
pub unsafe fn text(from: *const c_char) -> Option<String> {
    if from.is_null() {
        return None;
    }
    // SAFETY: by the promise of this function.
    Some(
        unsafe { CStr::from_ptr(from) }
            .to_string_lossy()
            .into_owned(),
    )
}

/// Refuses a NULL pointer.
pub fn given<T>(pointer: *const T, name: &str) -> Result<()> {
    if pointer.is_null() {
        return Err(invalid!("{name}: NULL; expected a pointer"));
    }
    Ok(())
}

/// Whether two stretches of memory share a byte.
pub fn overlap(a: *const u8, a_bytes: usize, b: *const u8, b_bytes: usize) -> bool {
    let (a, b) = (a as usize, b as usize);
    a_bytes > 0 && b_bytes > 0 && a < b.saturating_add(b_bytes) && b < a.saturating_add(a_bytes)
}
