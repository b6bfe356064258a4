/* The constants, types and layout of the C contract, ABI 0, on 64-bit targets, frozen.
 * tests/header.rs compiles this file against the public header. Lines are added with new items,
 * never changed. CARGO_MAJOR, MINOR and PATCH are the version in Cargo.toml. */
#include <rsbucket.h>

#define TYPE(expression, ...) _Generic((expression), __VA_ARGS__ : 1, default : 0)
#define CONSTANT(name, type, value) \
  _Static_assert(TYPE(name, type) && (name) == (value), #name " is not what the contract says")
#define ALIAS(name, ...) \
  _Static_assert(TYPE((name)0, __VA_ARGS__), #name " is not what the contract says")
#define SIZE(name, bytes) \
  _Static_assert(sizeof(name) == (bytes), #name " has not the size that the contract says")
#define FIELD(name, field, offset, ...) \
  _Static_assert(TYPE(((name *)0)->field, __VA_ARGS__) && offsetof(name, field) == (offset), \
                 #name "." #field " is not what the contract says")

CONSTANT(RSB_VERSION_MAJOR, int, CARGO_MAJOR);
CONSTANT(RSB_VERSION_MINOR, int, CARGO_MINOR);
CONSTANT(RSB_VERSION_PATCH, int, CARGO_PATCH);
CONSTANT(RSB_ABI_VERSION, unsigned, 0u);
CONSTANT(RSB_FEATURE_SHM, uint64_t, 0x1ull);
CONSTANT(RSB_FEATURE_CUDA, uint64_t, 0x2ull);
CONSTANT(RSB_FEATURE_NCCL, uint64_t, 0x4ull);
CONSTANT(RSB_OK, int, 0);
CONSTANT(RSB_PENDING, int, 1);
CONSTANT(RSB_ERR_INVALID_ARGUMENT, int, -1);
CONSTANT(RSB_ERR_BAD_HANDLE, int, -2);
CONSTANT(RSB_ERR_UNSUPPORTED, int, -3);
CONSTANT(RSB_ERR_NO_MEMORY, int, -4);
CONSTANT(RSB_ERR_BUSY, int, -5);
CONSTANT(RSB_ERR_NOT_LAUNCHED, int, -6);
CONSTANT(RSB_ERR_REENTRANT, int, -7);
CONSTANT(RSB_ERR_CANCELLED, int, -8);
CONSTANT(RSB_ERR_PERMISSION, int, -9);
CONSTANT(RSB_ERR_CONFIG_MISMATCH, int, -10);
CONSTANT(RSB_ERR_TIMEOUT, int, -20);
CONSTANT(RSB_ERR_PEER_LOST, int, -21);
CONSTANT(RSB_ERR_DESYNC, int, -22);
CONSTANT(RSB_ERR_ABORTED, int, -23);
CONSTANT(RSB_ERR_TRANSPORT, int, -24);
CONSTANT(RSB_ERR_PANIC, int, -99);
CONSTANT(RSB_DTYPE_F32, unsigned, 1u);
CONSTANT(RSB_DTYPE_F64, unsigned, 2u);
CONSTANT(RSB_DTYPE_F16, unsigned, 3u);
CONSTANT(RSB_DTYPE_BF16, unsigned, 4u);
CONSTANT(RSB_DTYPE_I32, unsigned, 5u);
CONSTANT(RSB_DTYPE_I64, unsigned, 6u);
CONSTANT(RSB_DTYPE_U8, unsigned, 7u);
CONSTANT(RSB_DTYPE_I8, unsigned, 8u);
CONSTANT(RSB_OP_SUM, unsigned, 1u);
CONSTANT(RSB_OP_AVG, unsigned, 2u);
CONSTANT(RSB_OP_MIN, unsigned, 3u);
CONSTANT(RSB_OP_MAX, unsigned, 4u);
CONSTANT(RSB_OP_PROD, unsigned, 5u);
CONSTANT(RSB_COMM_EXACT, uint64_t, 0x1ull);
CONSTANT(RSB_COLL_REDUCE_SCATTER, unsigned, 1u);
CONSTANT(RSB_COLL_ALL_TO_ALL, unsigned, 2u);
CONSTANT(RSB_COLL_ALL_GATHER, unsigned, 3u);
CONSTANT(RSB_TRANSPORT_REDUCE_SCATTER, uint64_t, 0x1ull);
CONSTANT(RSB_TRANSPORT_ALL_TO_ALL, uint64_t, 0x2ull);
CONSTANT(RSB_TRANSPORT_ALL_GATHER, uint64_t, 0x4ull);
CONSTANT(RSB_TRANSPORT_DEVICE, uint64_t, 0x100ull);
CONSTANT(RSB_SUBMIT_ACCUMULATE, unsigned, 1u);
CONSTANT(RSB_SUBMIT_BORROW, unsigned, 2u);
CONSTANT(RSB_LOG_ERROR, int, 1);
CONSTANT(RSB_LOG_WARN, int, 2);
CONSTANT(RSB_LOG_INFO, int, 3);
CONSTANT(RSB_LOG_DEBUG, int, 4);

ALIAS(rsb_status, int32_t);
ALIAS(rsb_dtype, uint32_t);
ALIAS(rsb_op, uint32_t);
ALIAS(rsb_ticket, uint64_t);
ALIAS(rsb_callback, void (*)(void *user_data, const rsb_result *result));
ALIAS(rsb_log_fn,
      void (*)(void *user_data, int32_t level, const char *target, const char *message));

SIZE(rsb_error, 256);
FIELD(rsb_error, status, 0, rsb_status);
FIELD(rsb_error, native_code, 4, int32_t);
FIELD(rsb_error, peer, 8, int32_t);
FIELD(rsb_error, reserved, 12, uint32_t);
FIELD(rsb_error, message, 16, char *);
_Static_assert(sizeof(((rsb_error *)0)->message) == 240, "rsb_error.message is not 240 bytes");

SIZE(rsb_comm_config, 64);
FIELD(rsb_comm_config, struct_size, 0, size_t);
FIELD(rsb_comm_config, timeout_ns, 8, uint64_t);
FIELD(rsb_comm_config, flags, 16, uint64_t);
FIELD(rsb_comm_config, stream, 24, void *);
FIELD(rsb_comm_config, label, 32, const char *);
FIELD(rsb_comm_config, result_stream, 40, void *);
FIELD(rsb_comm_config, control, 48, rsb_comm *);
FIELD(rsb_comm_config, staging_bytes, 56, size_t);

SIZE(rsb_coll, 56);
FIELD(rsb_coll, struct_size, 0, size_t);
FIELD(rsb_coll, send, 8, const void *);
FIELD(rsb_coll, recv, 16, void *);
FIELD(rsb_coll, count, 24, size_t);
FIELD(rsb_coll, kind, 32, uint32_t);
FIELD(rsb_coll, dtype, 36, rsb_dtype);
FIELD(rsb_coll, op, 40, rsb_op);
FIELD(rsb_coll, reserved, 44, uint32_t);
FIELD(rsb_coll, stream, 48, void *);

SIZE(rsb_transport, 80);
FIELD(rsb_transport, struct_size, 0, size_t);
FIELD(rsb_transport, flags, 8, uint64_t);
FIELD(rsb_transport, ctx, 16, void *);
FIELD(rsb_transport, start, 24, int32_t (*)(void *ctx, const rsb_coll *coll, void **request));
FIELD(rsb_transport, test, 32, int32_t (*)(void *ctx, void *request, int32_t *done));
FIELD(rsb_transport, abort, 40, void (*)(void *ctx));
FIELD(rsb_transport, release, 48, void (*)(void *ctx));
FIELD(rsb_transport, reduce_dtypes, 56, uint64_t);
FIELD(rsb_transport, max_count, 64, size_t);
FIELD(rsb_transport, describe, 72, void (*)(void *ctx, int32_t code, char *text, size_t size));

SIZE(rsb_allocator, 40);
FIELD(rsb_allocator, struct_size, 0, size_t);
FIELD(rsb_allocator, ctx, 8, void *);
FIELD(rsb_allocator, alloc, 16,
      void *(*)(void *ctx, size_t bytes, size_t align, int32_t device, void *stream));
FIELD(rsb_allocator, free, 24,
      void (*)(void *ctx, void *ptr, size_t bytes, int32_t device, void *stream));
FIELD(rsb_allocator, release, 32, void (*)(void *ctx));

SIZE(rsb_config, 32);
FIELD(rsb_config, struct_size, 0, size_t);
FIELD(rsb_config, bucket_bytes, 8, int64_t);
FIELD(rsb_config, flags, 16, uint64_t);
FIELD(rsb_config, allocator, 24, const rsb_allocator *);

SIZE(rsb_result, 88);
FIELD(rsb_result, struct_size, 0, size_t);
FIELD(rsb_result, ticket, 8, rsb_ticket);
FIELD(rsb_result, tag, 16, uint64_t);
FIELD(rsb_result, data, 24, void *);
FIELD(rsb_result, numel, 32, size_t);
FIELD(rsb_result, valid_numel, 40, size_t);
FIELD(rsb_result, offset, 48, size_t);
FIELD(rsb_result, stream, 56, void *);
FIELD(rsb_result, shard, 64, rsb_shard *);
FIELD(rsb_result, error, 72, const rsb_error *);
FIELD(rsb_result, status, 80, rsb_status);
FIELD(rsb_result, dtype, 84, rsb_dtype);

SIZE(rsb_submit_args, 96);
FIELD(rsb_submit_args, struct_size, 0, size_t);
FIELD(rsb_submit_args, inputs, 8, const void *const *);
FIELD(rsb_submit_args, flat_input, 16, const void *);
FIELD(rsb_submit_args, output, 24, void *);
FIELD(rsb_submit_args, numel, 32, size_t);
FIELD(rsb_submit_args, dtype, 40, rsb_dtype);
FIELD(rsb_submit_args, output_dtype, 44, rsb_dtype);
FIELD(rsb_submit_args, op, 48, rsb_op);
FIELD(rsb_submit_args, flags, 52, uint32_t);
FIELD(rsb_submit_args, scale, 56, double);
FIELD(rsb_submit_args, tag, 64, uint64_t);
FIELD(rsb_submit_args, stream, 72, void *);
FIELD(rsb_submit_args, callback, 80, rsb_callback);
FIELD(rsb_submit_args, user_data, 88, void *);

SIZE(rsb_stats, 144);
FIELD(rsb_stats, ops_submitted, 0, uint64_t);
FIELD(rsb_stats, ops_completed, 8, uint64_t);
FIELD(rsb_stats, ops_failed, 16, uint64_t);
FIELD(rsb_stats, ops_bucketed, 24, uint64_t);
FIELD(rsb_stats, ops_direct, 32, uint64_t);
FIELD(rsb_stats, collectives_launched, 40, uint64_t);
FIELD(rsb_stats, flushes_full, 48, uint64_t);
FIELD(rsb_stats, flushes_explicit, 56, uint64_t);
FIELD(rsb_stats, payload_bytes, 64, uint64_t);
FIELD(rsb_stats, padding_bytes, 72, uint64_t);
FIELD(rsb_stats, copied_bytes, 80, uint64_t);
FIELD(rsb_stats, buffer_bytes, 88, uint64_t);
FIELD(rsb_stats, buffer_bytes_peak, 96, uint64_t);
FIELD(rsb_stats, pack_ns, 104, uint64_t);
FIELD(rsb_stats, wait_ns, 112, uint64_t);
FIELD(rsb_stats, reduce_ns, 120, uint64_t);
FIELD(rsb_stats, callback_ns, 128, uint64_t);
FIELD(rsb_stats, staging_bytes_peak, 136, uint64_t);
