//! What a program is, and how bytes become one.

use rsbucket::ffi::*;

use super::values::is_float;
use crate::input::Input;

/// Where a program runs.
#[derive(Clone, Copy, Debug)]
pub enum World {
    Alone,
    Threads(usize),
    Engine {
        size: usize,
        rank: usize,
        flags: u64,
        dtypes: u64,
        most: usize,
        delay: u32,
        good: u32,
        exact: bool,
    },
}

/// One op.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    pub flat: bool,
    pub numel: usize,
    pub dtype: u32,
    pub output_dtype: u32,
    pub op: u32,
    pub flags: u32,
    pub scale: f64,
    pub tag: u64,
    pub output: Output,
    pub then: Then,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Output {
    Library,
    Callers,
    /// This rank's own piece of the input.
    InPlace,
}

/// What the callback does, besides checking.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Then {
    Nothing,
    /// Submits an op of so many elements.
    Submit(usize),
    /// Calls what may not be called there.
    CallIn,
    /// Keeps the result.
    Retain,
    /// There is none.
    NoCallback,
}

#[derive(Clone, Copy, Debug)]
pub enum Step {
    Submit(Op),
    /// As above, by the call for common ops.
    Common(Op),
    Bad(u8),
    Launch,
    Flush,
    Poll,
    /// So many ops back, for so long.
    Wait(usize, u64),
    Gather(usize),
    ReleaseBuffers,
    /// Frees the bucketer; the next use makes another.
    Renew,
    /// On one rank alone.
    Abort(usize),
    /// From here on, one rank tags its ops otherwise.
    Twist(usize),
}

#[derive(Debug)]
pub struct Program {
    pub world: World,
    pub bucket_bytes: [i64; 2],
    /// How many allocations go well, where an allocator is given.
    pub allocations: Option<u32>,
    /// Each with the bucketer it is for.
    pub steps: Vec<(usize, Step)>,
}

impl Program {
    pub fn read(input: &mut Input) -> Program {
        let world = match input.below(4) {
            0 => World::Alone,
            1 => World::Threads(2 + input.below(2)),
            _ => engine(input),
        };
        let buckets = [0, -1, 64, 200, 1024, 4096];
        let bucket_bytes = [input.pick(&buckets), input.pick(&buckets)];
        // Memory that only one rank cannot have would put ranks out of step.
        let allocations = match (input.below(6), world) {
            (_, World::Threads(_)) => None,
            (0, _) => Some(u32::from(input.byte())),
            (1, _) => Some(u32::MAX),
            _ => None,
        };
        let mut steps = Vec::new();
        while !input.is_empty() && steps.len() < 64 {
            steps.push((input.below(5) / 4, step(input)));
        }
        let mut program = Program {
            world,
            bucket_bytes,
            allocations,
            steps,
        };
        program.mend();
        program
    }

    /// Callbacks that submit need the same place on every rank: where polls decide it, they do not.
    fn mend(&mut self) {
        let polls = |s: &(usize, Step)| matches!(s.1, Step::Poll | Step::Wait(..));
        if matches!(self.world, World::Threads(_)) && self.steps.iter().any(polls) {
            for (_, step) in &mut self.steps {
                if let Step::Submit(op) | Step::Common(op) = step {
                    if let Then::Submit(_) = op.then {
                        op.then = Then::CallIn;
                    }
                }
            }
        }
    }

    /// Whether everything must go well.
    pub fn is_sound(&self) -> bool {
        let breaks = |s: &(usize, Step)| matches!(s.1, Step::Abort(_) | Step::Twist(_));
        let fails = matches!(self.world, World::Engine { good, .. } if good != u32::MAX);
        !fails && self.allocations.is_none_or(|n| n == u32::MAX) && !self.steps.iter().any(breaks)
    }
}

fn engine(input: &mut Input) -> World {
    let size = 1 + input.below(3);
    let flags = 1 + input.below(7) as u64;
    let flags = if flags & 3 == 0 { flags | 2 } else { flags };
    let all_to_all = flags & RSB_TRANSPORT_ALL_TO_ALL != 0;
    World::Engine {
        size,
        rank: input.below(size),
        flags,
        // Without an all-to-all it takes every dtype.
        dtypes: if all_to_all {
            input.pick(&[0, 0b10, 0x1fe, 0b110])
        } else {
            0
        },
        most: input.pick(&[0, 1, 7, 100]),
        delay: input.below(4) as u32,
        good: match input.below(5) {
            0 => input.below(40) as u32,
            _ => u32::MAX,
        },
        exact: all_to_all && input.yes(),
    }
}

fn step(input: &mut Input) -> Step {
    match input.below(20) {
        0..=6 => Step::Submit(op(input)),
        7 | 8 => Step::Common(common(input)),
        9 | 10 => Step::Bad(input.byte()),
        11 => Step::Launch,
        12 => Step::Flush,
        13 => Step::Poll,
        14 => Step::Wait(input.below(6), input.pick(&[0, 100_000, u64::MAX])),
        15 => Step::Gather(input.pick(&[0, 1, 64, 5000])),
        16 => Step::ReleaseBuffers,
        17 => Step::Renew,
        18 => match input.below(3) {
            0 => Step::Abort(input.below(3)),
            1 => Step::Twist(input.below(3)),
            _ => Step::Poll,
        },
        _ => Step::Launch,
    }
}

fn common(input: &mut Input) -> Op {
    let dtype = 1 + input.below(8) as u32;
    let ops = if is_float(dtype) {
        &[1, 2, 3, 4, 5][..]
    } else {
        &[1, 3, 4, 5][..]
    };
    Op {
        flat: false,
        numel: input.pick(&[1, 0, 2, 3, 7, 16, 33, 100, 700, 9000]),
        dtype,
        output_dtype: 0,
        op: input.pick(ops),
        flags: 0,
        scale: 0.0,
        tag: 0,
        output: Output::Library,
        then: match input.below(8) {
            0 => Then::Submit(input.pick(&[1, 5, 40, 300])),
            1 => Then::CallIn,
            2 => Then::Retain,
            3 => Then::NoCallback,
            _ => Then::Nothing,
        },
    }
}

fn op(input: &mut Input) -> Op {
    let mut op = common(input);
    op.flat = input.yes();
    op.tag = u64::from(input.byte());
    op.output = input.pick(&[
        Output::Library,
        Output::Callers,
        Output::InPlace,
        Output::Library,
    ]);
    if input.yes() {
        op.flags |= RSB_SUBMIT_BORROW;
    }
    if op.output == Output::Callers && input.yes() {
        op.flags |= RSB_SUBMIT_ACCUMULATE;
    }
    if is_float(op.dtype) {
        op.scale = input.pick(&[0.0, 1.0, 0.5, -2.0]);
        if op.output != Output::InPlace {
            op.output_dtype = input.below(5) as u32;
        }
    }
    op
}
