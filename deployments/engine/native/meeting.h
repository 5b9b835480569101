// Ranks of one machine that work in step: what one of them calls to send, sum and gather numbers through shared memory.
//
// All ranks make the same calls with the same sizes in the same order; of one rank, one thread at a time. A call returns a
// MeetingResult. Once one isn't MEETING_OK the meeting is over: every later call, and every rank that waits, gets the same result.
// `timeout_s` bounds the whole call, from the first time it has to sleep. Nothing here knows Python, models or batches.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

enum MeetingResult {
    MEETING_OK = 0,
    MEETING_LATE = 1,  // a rank didn't come within `timeout_s`: it hangs, is stopped, or does something else
    MEETING_LOST = 2,  // a rank's process has ended
};

// Bytes of the segment that `size` ranks need.
size_t mmaas_meeting_bytes(int size);

// Takes place `rank` of `size` in the zero-filled segment `fd`, which belongs to the meeting from then on: no other descriptor of
// it may be closed in this process, because that would look like this process's end. Null, with errno set, when that fails.
// The first call of any rank must come after the join of all.
void* mmaas_meeting_join(int fd, size_t bytes, int rank, int size);

// Every rank's `data` becomes the sum over the ranks, in the order of ranks and so bitwise the same on all.
int mmaas_meeting_all_reduce(void* meeting, float* data, int64_t count, double timeout_s);

// The same for bfloat16: summed in float32, rounded once.
int mmaas_meeting_all_reduce_bf16(void* meeting, uint16_t* data, int64_t count, double timeout_s);

// `data` of rank 0 to every other rank's. Rank 0 doesn't wait until they have come for it, unless there is more than one chunk.
int mmaas_meeting_broadcast(void* meeting, void* data, int64_t bytes, double timeout_s);

// Every rank's `rows` x `columns` side by side in `out` of rank 0, which has `rows` x (`size` * `columns`); others may pass null.
int mmaas_meeting_gather(void* meeting, const float* part, int64_t rows, int64_t columns, float* out, double timeout_s);

// After a failure: the rank that was waited for. Before one: -1.
int mmaas_meeting_missing(void* meeting);

// How many rounds this rank has begun. May be asked from any thread.
uint32_t mmaas_meeting_round(const void* meeting);

// Ranks that still wait for this one see it as lost. `meeting` is gone afterwards.
void mmaas_meeting_leave(void* meeting);
}
