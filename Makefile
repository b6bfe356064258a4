# The two commands of the README, and what they are made of.
#
#   make demo   trains on handwritten digits with four processes, through the library
#   make test   every test: Rust, C and C++, plain and under sanitizers
#
# `make demo` needs cargo and a C compiler. `make test` installs what it lacks (tools/setup).

CARGO ?= cargo
CC    ?= cc
JOBS  ?= 2
RANKS ?= 4

.PHONY: demo lib test lint rust c sanitize tsan models models-slice memcheck bench bench-torch header ptx ptx-check
.PHONY: campaigns clean

demo: target/demo/train_digits
	target/demo/train_digits --ranks $(RANKS) --data data/digits.csv

lib:
	$(CARGO) build --release --locked

DEMO := train_digits trainer mlp digits
target/demo/train_digits: lib $(DEMO:%=c_examples/%.c) include/rsbucket.h
	@mkdir -p target/demo
	$(CC) -std=c99 -O2 -Wall -Wextra -Iinclude $(DEMO:%=c_examples/%.c) -o $@ \
	  -Ltarget/release -lrsbucket -lm -Wl,-rpath,$(CURDIR)/target/release

test: rust c sanitize campaigns

rust:
	tools/setup
	$(CARGO) build --locked
	$(CARGO) test --locked
	$(CARGO) build --release --locked
	$(CARGO) test --release --locked --lib

c:
	tools/setup
	cmake -S . -B build -DCMAKE_BUILD_TYPE=Release
	cmake --build build -j $(JOBS)
	ctest --test-dir build --output-on-failure -j $(JOBS)

# The C and C++ tests under AddressSanitizer and UBSan.
sanitize:
	tools/setup
	cmake -S . -B build/sanitize -DRSB_SANITIZE=address,undefined -DRSB_TARGET_DIR=$(CURDIR)/target
	cmake --build build/sanitize -j $(JOBS)
	ctest --test-dir build/sanitize --output-on-failure -j $(JOBS)

# A little of each failure campaign, about half a minute (campaigns/README.md).
campaigns: lib
	$(MAKE) -C campaigns slice

# The ring, with ranks as threads, under ThreadSanitizer: needs a nightly toolchain with rust-src, since a
# library or a standard library that is not instrumented gives false reports. Elsewhere it says so.
TSAN_TARGET := $(shell uname -m)-unknown-linux-gnu
tsan:
	@if [ -d "$$(rustc +nightly --print sysroot 2>/dev/null)/lib/rustlib/src/rust" ]; then \
	  RUSTFLAGS=-Zsanitizer=thread PROPTEST_CASES=60 $(CARGO) +nightly test --locked -Zbuild-std \
	    --target $(TSAN_TARGET) --target-dir target/tsan --lib -- bucketer:: handle:: memory::; \
	else echo "tsan: skipped, no nightly toolchain with rust-src"; fi

# The group protocol under two model checkers: loom in every order that it is given time for, shuttle at
# four ranks in random ones. `models-slice` is what CI runs, `models` goes further; tools/mutate_models
# proves that they bite. Results: docs/results/models.md.
models: export RSBUCKET_MODELS = full
models models-slice: export RUST_BACKTRACE = 0
models: export RSBUCKET_MODEL_ROUNDS ?= 100000
MODEL_TEST = $(CARGO) test --locked --profile model --lib
models models-slice:
	RUSTFLAGS="--cfg loom" $(MODEL_TEST) --target-dir target/loom -- --nocapture ring::model
	RUSTFLAGS="--cfg shuttle" $(MODEL_TEST) --target-dir target/shuttle -- --nocapture ring::model

# The C and C++ programs under valgrind, Rust code included (about ten minutes of CPU time): all but those whose
# times or system calls valgrind changes, and the NaNs of test_values, which it computes in its own way.
MEMCHECK := $(addprefix test_,arguments bucketer callbacks comm custom dtype exceptions fairscale handles hooks \
  identity mismatch original_defects results status version waiting)
memcheck:
	tools/setup
	cmake -S . -B build -DCMAKE_BUILD_TYPE=Release
	cmake --build build -j $(JOBS)
	tools/memcheck build/memcheck $(MEMCHECK:%=build/cpp_tests/%) build/c_examples/01_threads \
	  build/c_examples/02_processes build/c_examples/03_custom_engine \
	  "build/c_examples/04_dlopen target/release/librsbucket.so"

# The library beside MPICH, Open MPI and the memory floors: one table (about 10 minutes; bench/README.md).
bench:
	bench/run

# The same with the original's algorithm on PyTorch's gloo, which takes 6 GB under target/ (about 5 minutes).
bench-torch:
	bench/run --torch

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) fmt --manifest-path benches/Cargo.toml --check
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items

# Writes include/rsbucket.h anew from src/ffi.
header:
	RSBUCKET_UPDATE_HEADER=1 $(CARGO) test --locked --test header committed_header_is_current

# Makes the GPU kernels' text anew from src/cuda/*.cu, or checks that it is what they make and assembles it for
# every architecture: no GPU is needed, the compiler comes from PyPI (312 MB under target/, half a minute).
ptx:
	tools/make_ptx
ptx-check:
	tools/make_ptx --check

clean:
	rm -rf build target
