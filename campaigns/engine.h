/* engine.h - an engine for threads: all-to-all and all-gather, with memory of its own between the ranks. */
#ifndef ENGINE_H
#define ENGINE_H

#include <rsbucket.h>
#include <stdint.h>

/* Makes the comms of `size` ranks on one engine, which goes with the last of them. */
rsb_status engine_comms(uint32_t size, const rsb_comm_config *config, rsb_comm **out, rsb_error *err);

#endif
