/* The functions of the C contract, ABI 0, frozen. tests/header.rs compares the public header with
 * them word for word and compiles both together. Lines are added with new functions, never changed.
 */
uint32_t rsb_version(void);
uint32_t rsb_abi_version(void);
const char *rsb_version_string(void);
uint64_t rsb_features(void);
const char *rsb_status_name(rsb_status status);
size_t rsb_dtype_size(rsb_dtype dtype);
rsb_status rsb_comm_create_local(uint32_t size, const rsb_comm_config *config, rsb_comm **out_comms,
    rsb_error *err);
rsb_status rsb_comm_create_shm(const char *name, uint32_t rank, uint32_t size,
    const rsb_comm_config *config, rsb_comm **out_comm, rsb_error *err);
rsb_status rsb_comm_wrap_nccl(void *nccl_comm, const rsb_comm_config *config, rsb_comm **out_comm,
    rsb_error *err);
rsb_status rsb_comm_create_custom(const rsb_transport *transport, uint32_t rank, uint32_t size,
    const rsb_comm_config *config, rsb_comm **out_comm, rsb_error *err);
uint32_t rsb_comm_rank(const rsb_comm *comm);
uint32_t rsb_comm_size(const rsb_comm *comm);
rsb_status rsb_comm_status(const rsb_comm *comm, rsb_error *err);
rsb_status rsb_comm_all_gather(rsb_comm *comm, const void *input, void *output, size_t bytes,
    rsb_error *err);
rsb_status rsb_comm_shrink(rsb_comm *comm, const rsb_comm_config *config, rsb_comm **out_comm,
    rsb_error *err);
void rsb_comm_abort(rsb_comm *comm);
void rsb_comm_free(rsb_comm *comm);
rsb_status rsb_bucketer_create(const rsb_config *config, rsb_bucketer **out, rsb_error *err);
rsb_status rsb_bucketer_reduce_scatter_async(rsb_bucketer *bucketer, rsb_comm *comm,
    const void *const *inputs, size_t numel, rsb_dtype dtype, rsb_op op, rsb_callback callback,
    void *user_data, rsb_error *err);
rsb_status rsb_bucketer_submit(rsb_bucketer *bucketer, rsb_comm *comm, const rsb_submit_args *args,
    rsb_ticket *out_ticket, rsb_error *err);
size_t rsb_shard_numel(size_t numel, uint32_t comm_size);
rsb_status rsb_bucketer_launch(rsb_bucketer *bucketer, rsb_error *err);
rsb_status rsb_bucketer_flush(rsb_bucketer *bucketer, rsb_error *err);
rsb_status rsb_bucketer_poll(rsb_bucketer *bucketer, size_t *out_completed, rsb_error *err);
rsb_status rsb_bucketer_wait(rsb_bucketer *bucketer, rsb_ticket ticket, uint64_t timeout_ns,
    rsb_error *err);
rsb_shard *rsb_shard_retain(rsb_shard *shard);
void rsb_shard_release(rsb_shard *shard);
rsb_status rsb_bucketer_release_buffers(rsb_bucketer *bucketer, rsb_error *err);
rsb_status rsb_bucketer_free(rsb_bucketer *bucketer);
rsb_status rsb_bucketer_stats(const rsb_bucketer *bucketer, rsb_stats *out, size_t out_size);
rsb_status rsb_set_logger(rsb_log_fn fn, void *user_data, void (*release)(void *),
    int32_t max_level);
