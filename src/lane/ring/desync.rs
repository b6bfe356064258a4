//! Names the first call in which ranks differ: the message of RSB_ERR_DESYNC.
//!
//! Built only after a mismatch, from the calls that every rank keeps readable.

use crate::comm::control::CALLS;
use crate::comm::group::Group;
use crate::error::{Error, Status};
use crate::fingerprint::{fields, Words};

/// What differs between the ranks that have published chunk `seq`, in one sentence.
pub fn describe(group: &Group, seq: u64) -> Error {
    let ranks = 0..group.size();
    // A rank's calls count up to the one that published the chunk.
    let made: Vec<u64> = ranks
        .clone()
        .map(|r| group.published(r, seq).map_or(0, |p| p.chain.calls))
        .collect();
    let first = ranks.map(|r| group.oldest_recorded(r)).max().unwrap_or(0);
    // What a line says is checked against what can be kept: a peer's memory is not to be trusted.
    let last = made
        .iter()
        .copied()
        .max()
        .unwrap_or(0)
        .min(first + CALLS as u64);
    for number in first..last {
        let calls: Vec<Option<Words>> = (0..group.size())
            .map(|r| {
                (number < made[r as usize])
                    .then(|| group.recorded(r, number))
                    .flatten()
            })
            .collect();
        if calls.iter().any(|c| *c != calls[0]) {
            return name(number, &calls);
        }
    }
    let text =
        format!("ranks submitted different work before call {first}; what is kept since is equal");
    Error::new(Status::Desync, text)
}

/// The sentence for call `number`, given what each rank made of it.
pub fn name(number: u64, calls: &[Option<Words>]) -> Error {
    let votes = |c: &Option<Words>| calls.iter().filter(|d| *d == c).count();
    // The reference is what most ranks did; rank 0's call where no strict majority exists.
    let major = calls.iter().position(|c| votes(c) * 2 > calls.len());
    let reference = major.unwrap_or(0);
    let other = (0..calls.len())
        .find(|&r| calls[r] != calls[reference])
        .unwrap_or(reference);
    let shown = |rank: usize| calls[rank].map(|w| fields(&w));
    let (field, theirs, ours) = match (shown(reference), shown(other)) {
        (Some(a), Some(b)) => {
            let differing = a.iter().zip(&b).find(|(x, y)| x != y);
            differing.map_or(("call", String::new(), String::new()), |(x, y)| {
                (x.0, x.1.clone(), y.1.clone())
            })
        }
        (a, b) => {
            let call =
                |f: Option<[(&str, String); 9]>| f.map_or("nothing".into(), |f| f[0].1.clone());
            ("call", call(a), call(b))
        }
    };
    let tag = calls[reference].or(calls[other]).map_or(0, |w| w[1]);
    let blame = match major {
        Some(_) => format!("rank {other} is in the minority"),
        None => "no majority".to_string(),
    };
    let text = format!(
        "ranks submitted different work: first at call {number} (tag {tag}), {field} is {theirs} on \
         rank {reference} and {ours} on rank {other}; {blame}"
    );
    let error = Error::new(Status::Desync, text);
    match major {
        Some(_) => error.blame(other as u32),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::{DType, Op};
    use crate::fingerprint::{Call, CallKind};

    fn words(numel: u64, tag: u64) -> Option<Words> {
        let call = Call {
            types: Some((DType::F32, Op::Sum)),
            tag,
            ..Call::bare(CallKind::Submit, 0, 1024, numel)
        };
        Some(call.words())
    }

    #[test]
    fn the_minority_is_named_with_field_and_values() {
        let e = name(17, &[words(8, 5), words(8, 5), words(9, 5), words(8, 5)]);
        assert_eq!((e.status, e.peer), (Status::Desync, 2));
        for part in [
            "call 17",
            "tag 5",
            "numel is 8 on rank 0 and 9 on rank 2",
            "rank 2 is in the minority",
        ] {
            assert!(e.message.contains(part), "{part} in {}", e.message);
        }
        assert!(e.message.len() < 240);
    }

    #[test]
    fn two_ranks_have_no_majority_and_a_missing_call_is_named() {
        let e = name(0, &[words(8, 5), None]);
        assert_eq!(e.peer, -1);
        assert!(
            e.message
                .contains("call is submit on rank 0 and nothing on rank 1"),
            "{}",
            e.message
        );
    }
}
